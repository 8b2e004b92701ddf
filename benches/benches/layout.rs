//! Extent maps to layouts: what a scan computes for every file between two system calls.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pagefold_engine::identity::{AddressSpace, DeviceClass};
use pagefold_engine::layout::{CacheState, ExtentFlags, Layout, MapFacts, RawExtent};
use pagefold_engine::units::{FsId, PageSize};

/// Extents of four pages, scattered on disk, so that none join; the last ends within a page.
fn extents(count: u64) -> (Vec<RawExtent>, u64) {
    let length = 4 * 4096;
    let list = (0..count)
        .map(|i| RawExtent {
            logical: i * length,
            physical: (i * 7919 % count + 1) * 10 * length,
            length,
            flags: if i + 1 == count { ExtentFlags::LAST } else { ExtentFlags::SHARED },
        })
        .collect();
    (list, count * length - 100)
}

fn from_extents(c: &mut Criterion) {
    let mut group = c.benchmark_group("layout/from_extents");
    let space = Some(AddressSpace { fs: FsId(0), class: DeviceClass::Data });
    for count in [1, 8, 1000] {
        let (extents, size) = extents(count);
        let facts =
            MapFacts { size, extents: &extents, space, cache: CacheState::Clean, page: PageSize::KIB4 };
        assert_eq!(
            Layout::from_extents(facts).runs.len() as u64,
            count + 1,
            "every extent a run, and the tail"
        );
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| Layout::from_extents(black_box(facts)));
        });
    }
    group.finish();
}

criterion_group!(benches, from_extents);
criterion_main!(benches);
