//! Content identity: hashing pages, learning what the hashes say, relabelling the map by it.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pagefold_engine::content::{ContentIndex, PageHash};
use pagefold_engine::identity::{AddressSpace, DeviceClass, Identity};
use pagefold_engine::layout::{Layout, Run};
use pagefold_engine::share_map::{Cached, LayoutId, ShareMap};
use pagefold_engine::units::{DomainId, FsId, MappingId, PageCount, PageIndex, PageSize, RootId, Span};

const FILES: u64 = 10_000;
const PAGES: u64 = 16;

fn page_hash(c: &mut Criterion) {
    let mut group = c.benchmark_group("content/page_hash");
    for pages in [1u64, 256] {
        let bytes: Vec<u8> = (0..pages * 4096).map(|i| (i * 31 % 251) as u8).collect();
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{pages} pages")), |b| {
            b.iter(|| {
                for page in black_box(&bytes).chunks_exact(4096) {
                    black_box(blake3::hash(page));
                }
            });
        });
    }
    group.finish();
}

/// Files at places of their own; every other one has the same bytes as its neighbour.
fn files() -> (ShareMap, Vec<Vec<PageHash>>) {
    let space = AddressSpace { fs: FsId(0), class: DeviceClass::Data };
    let layouts = (0..FILES)
        .map(|file| {
            let identity = Identity::Physical { space, page: file * 2 * PAGES };
            let run = Run { start: PageIndex(0), pages: PageCount(PAGES), identity };
            Arc::new(Layout { size: PAGES * 4096, runs: vec![run] })
        })
        .collect();
    let mut map = ShareMap::new(PageSize::KIB4, vec![DomainId(0)], layouts);
    let mut hashes = Vec::new();
    for file in 0..FILES {
        map.push(RootId(0), LayoutId(file as u32), Cached::None);
        let hash = |page: u64| {
            let mut hash = PageHash::default();
            hash.copy_from_slice(&blake3::hash(&(file / 2 * PAGES + page).to_le_bytes()).as_bytes()[..16]);
            hash
        };
        hashes.push((0..PAGES).map(hash).collect());
    }
    (map, hashes)
}

fn learn_all(map: &ShareMap, hashes: &[Vec<PageHash>]) -> ContentIndex {
    let mut index = ContentIndex::default();
    for (file, hashes) in hashes.iter().enumerate() {
        let span = Span {
            mapping: MappingId(file as u32),
            start: PageIndex(0),
            pages: PageCount(hashes.len() as u64),
        };
        index.learn(map, span, hashes);
    }
    index
}

fn relabel(c: &mut Criterion) {
    let (map, hashes) = files();
    let index = learn_all(&map, &hashes);
    assert_eq!(index.distinct().0, FILES / 2 * PAGES, "every other file is new");
    let mut group = c.benchmark_group("content");
    group.throughput(Throughput::Elements(FILES * PAGES)).sample_size(20);
    group.bench_function("read_plan", |b| b.iter(|| map.read_plan()));
    group.bench_function("learn", |b| b.iter(|| learn_all(&map, &hashes)));
    group.bench_function("relabelled", |b| b.iter(|| map.relabelled(&index)));
    group.finish();
}

criterion_group!(benches, page_hash, relabel);
criterion_main!(benches);
