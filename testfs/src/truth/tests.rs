//! Figures of hand-made roots, worked out on paper.

use super::*;

fn same(object: u64, page: u64, valid: u32) -> TruePage {
    TruePage::Same { object, page, valid }
}

fn file(names: &[&str], size: u64, runs: &[(u64, TruePage)], resident: &[(u64, u64)]) -> TrueFile {
    TrueFile {
        names: names.iter().map(PathBuf::from).collect(),
        size,
        runs: runs.iter().map(|&(pages, first)| TrueRun { pages, first }).collect(),
        resident: resident.to_vec(),
    }
}

fn root(domain: u16, files: Vec<TrueFile>) -> TrueRoot {
    TrueRoot { path: PathBuf::from("r"), domain, files }
}

const P: u64 = PAGE;

#[test]
fn clones_holes_and_undecided_pages_count_as_defined() {
    let whole = |resident: &[_]| file(&["a"], 3 * P, &[(2, same(1, 0, 0)), (1, TruePage::Zero)], resident);
    let truth = Truth {
        roots: vec![
            root(0, vec![whole(&[(0, 3)]), file(&["u", "v"], 2 * P, &[(2, TruePage::Undecided)], &[(0, 2)])]),
            root(
                0,
                vec![whole(&[(1, 1)]), file(&["b"], P + 9, &[(1, same(1, 0, 0)), (1, same(1, 1, 9))], &[])],
            ),
        ],
    };
    let expected = truth.expected();
    let wanted = Figures {
        files: 4,
        hard_links: 1,
        logical_bytes: 3 * P + 2 * P + 3 * P + P + 9,
        cache_bytes: 8 * P,
        mergeable_file_bytes: 2 * P,
        mergeable_page_bytes: 3 * P,
        zero_bytes: 2 * P,
        undecided_bytes: 2 * P,
        resident_bytes: 6 * P,
        resident_duplicate_bytes: P,
    };
    assert_eq!(expected.totals, wanted);
    assert_eq!(expected.roots[0].0.mergeable_page_bytes, 0);
    assert_eq!(expected.roots[1].0.mergeable_page_bytes, P, "page 0 twice within the root");
    assert_eq!((expected.roots[0].1, expected.roots[1].1), (2 * P, 2 * P));
    assert_eq!(
        expected.matrix,
        vec![vec![4 * P, 2 * P], vec![2 * P, 3 * P]],
        "undecided on the diagonal only"
    );
}

#[test]
fn nothing_is_equal_across_domains() {
    let one = || vec![file(&["a"], P, &[(1, same(1, 0, 0))], &[(0, 1)])];
    let expected = Truth { roots: vec![root(0, one()), root(1, one())] }.expected();
    assert_eq!(expected.totals.mergeable_page_bytes, 0);
    assert_eq!(expected.totals.resident_duplicate_bytes, 0);
    assert_eq!(expected.roots[0].1, 0);
    assert_eq!(expected.matrix, vec![vec![P, 0], vec![0, P]]);
}

#[test]
fn a_tail_is_equal_only_with_the_same_valid_length_and_size() {
    let of = |size, valid| file(&["a"], size, &[(1, same(1, 0, valid))], &[]);
    let truth = Truth { roots: vec![root(0, vec![of(100, 100), of(200, 200), of(100, 100)])] };
    let totals = truth.expected().totals;
    assert_eq!((totals.mergeable_page_bytes, totals.mergeable_file_bytes), (P, P));
}

#[test]
fn whole_files_of_zeros_only_or_with_undecided_pages_never_merge() {
    let hole = || file(&["h"], P, &[(1, TruePage::Zero)], &[(0, 1)]);
    let half = || file(&["u"], 2 * P, &[(1, same(1, 0, 0)), (1, TruePage::Undecided)], &[]);
    let totals = Truth { roots: vec![root(0, vec![hole(), hole(), half(), half()])] }.expected().totals;
    assert_eq!((totals.mergeable_file_bytes, totals.mergeable_page_bytes), (0, P));
    assert_eq!((totals.resident_bytes, totals.resident_duplicate_bytes), (2 * P, 0));
}

#[test]
fn how_a_file_is_cut_into_runs_does_not_matter() {
    let one = file(&["a"], 3 * P, &[(3, same(1, 4, 0))], &[]);
    let cut = file(&["b"], 3 * P, &[(1, same(1, 4, 0)), (2, same(1, 5, 0))], &[]);
    assert_eq!(one.signature(), cut.signature());
}
