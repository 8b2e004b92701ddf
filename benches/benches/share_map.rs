//! The figures of a farm: 64 clones of 10,000 layouts of which some percent have drifted. One sweep over all runs.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pagefold_engine::identity::{AddressSpace, DeviceClass, Identity};
use pagefold_engine::layout::{Layout, Run};
use pagefold_engine::share_map::{Cached, LayoutId, ShareMap};
use pagefold_engine::units::{DomainId, FsId, PageCount, PageIndex, PageSize, RootId};

const CLONES: u32 = 64;
const FILES: u64 = 10_000;
const PAGES: u64 = 16;

fn run(start: u64, pages: u64, at: u64) -> Run {
    let space = AddressSpace { fs: FsId(0), class: DeviceClass::Data };
    Run { start: PageIndex(start), pages: PageCount(pages), identity: Identity::Physical { space, page: at } }
}

fn layout(runs: Vec<Run>) -> Arc<Layout> {
    Arc::new(Layout { size: PAGES * 4096, runs })
}

/// Every clone shows all files of the image; `drift_percent` of them have pages 4 to 7 elsewhere, each clone its own.
fn farm(drift_percent: u64) -> ShareMap {
    let place = |file: u64| file * 2 * PAGES;
    let mut layouts: Vec<_> = (0..FILES).map(|f| layout(vec![run(0, PAGES, place(f))])).collect();
    let mut shown = Vec::new();
    let mut free = place(FILES);
    for clone in 0..u64::from(CLONES) {
        for file in 0..FILES {
            // Spread by a number without common factors, so that each clone drifts elsewhere.
            if (file * 7919 + clone * 131) % 100 >= drift_percent {
                shown.push(LayoutId(file as u32));
                continue;
            }
            let (first, rest) = (run(0, 4, place(file)), run(8, PAGES - 8, place(file) + 8));
            shown.push(LayoutId(layouts.len() as u32));
            layouts.push(layout(vec![first, run(4, 4, free), rest]));
            free += 8;
        }
    }
    let mut map = ShareMap::new(PageSize::KIB4, vec![DomainId(0); CLONES as usize], layouts);
    for (at, layout) in shown.into_iter().enumerate() {
        let cached = if at % 10 == 0 { Cached::All } else { Cached::None };
        map.push(RootId((at as u64 / FILES) as u32), layout, cached);
    }
    map
}

fn savings(c: &mut Criterion) {
    let mut group = c.benchmark_group("share_map/savings");
    group.throughput(Throughput::Elements(u64::from(CLONES) * FILES)).sample_size(10);
    for drift in [0, 5, 50] {
        let map = farm(drift);
        for matrix in [false, true] {
            let name = format!("drift {drift} %{}", if matrix { ", matrix" } else { "" });
            group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(|| map.savings(matrix)));
        }
    }
    group.finish();
}

criterion_group!(benches, savings);
criterion_main!(benches);
