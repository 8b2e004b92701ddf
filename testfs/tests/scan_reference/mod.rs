//! What a scan of simulated trees must report, counted page by page from raw facts.
//!
//! Invariant: nothing here uses extent maps, `Layout`, the engine's figures or the scan; only [`Truth`], which sums up,
//! and the simulated host's own blocks and bytes.

pub mod grow;
pub mod recorder;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use pagefold_fsadapters::scan::{ScanReport, Sizes};
use pagefold_testfs::sim::{RawBlock, RawFile};
use pagefold_testfs::truth::{Expected, Figures, TrueFile, TruePage, TrueRoot, TrueRun, Truth};

use recorder::Look;

const PAGE: u64 = 4096;

/// A group of equal whole files as the report should name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub path: PathBuf,
    pub copies: u64,
    pub cache_bytes_each: u64,
    pub resident_duplicate_bytes: u64,
}

/// Everything the report must say.
pub struct Reference {
    pub expected: Expected,
    pub groups: Vec<Group>,
    /// Undecided pages by path, of what was counted.
    pub undecided: BTreeMap<PathBuf, u64>,
}

/// What a page is known by.
#[derive(Clone, Copy, Debug)]
pub enum By<'a> {
    /// Its place on disk.
    Extents,
    /// Its bytes, if it was read through one of these names, or a page at the same place was.
    Bytes(&'a BTreeSet<(PathBuf, u64)>),
}

/// Numbers of contents begin here; those of disks are small.
const CONTENTS: u64 = 1 << 40;

/// Numbers distinct bytes, and knows which places on disk were read.
struct Contents<'a> {
    hashed: &'a BTreeSet<(PathBuf, u64)>,
    places: HashSet<TruePage>,
    numbers: HashMap<&'a [u8], u64>,
}

impl<'a> Contents<'a> {
    fn new(hashed: &'a BTreeSet<(PathBuf, u64)>, looks: &BTreeMap<PathBuf, Option<Look>>) -> Self {
        let mut places = HashSet::new();
        for (path, look) in looks {
            let Some(look) = look else { continue };
            let pages = by_extents(look).into_iter().enumerate();
            let read = pages.filter(|(at, _)| hashed.contains(&(path.clone(), *at as u64)));
            places.extend(read.map(|(_, page)| page));
        }
        places.remove(&TruePage::Undecided);
        Contents { hashed, places, numbers: HashMap::new() }
    }

    fn page(&mut self, place: TruePage, name: &Path, at: u64, data: &'a [u8]) -> TruePage {
        let read = self.places.contains(&place) || self.hashed.contains(&(name.to_owned(), at));
        if place == TruePage::Zero || !read {
            return place;
        }
        let next = CONTENTS + self.numbers.len() as u64;
        let object = *self.numbers.entry(data).or_insert(next);
        TruePage::Same { object, page: 0, valid: 0 }
    }
}

/// What disk and cache say of each page up to EOF (design section 5).
fn by_extents(look: &Look) -> Vec<TruePage> {
    let facts = &look.facts;
    let pages = facts.pages.len() as u64;
    if look.moved {
        return vec![TruePage::Undecided; pages as usize];
    }
    let clean = facts.has_map && facts.may_ask_cache && !facts.dirty && !look.dirty;
    (0..pages).map(|page| if clean { on_disk(facts, page) } else { unless_hole(facts, page) }).collect()
}

/// The file's blocks that page `page` is made of, up to EOF.
fn blocks(facts: &RawFile, page: u64) -> Vec<Option<RawBlock>> {
    let per_page = PAGE / facts.block_bytes;
    let end = facts.size.div_ceil(facts.block_bytes).min((page + 1) * per_page);
    (page * per_page..end).map(|at| facts.blocks.get(&at).copied()).collect()
}

/// Where the map may lie only the absence of any reservation is a fact. Without extents pages are in cache or nowhere.
fn unless_hole(facts: &RawFile, page: u64) -> TruePage {
    let nothing = match facts.has_map {
        true => blocks(facts, page).iter().all(Option::is_none) && !(page == 0 && facts.inline),
        false => facts.cached.binary_search(&page).is_err(),
    };
    if nothing { TruePage::Zero } else { TruePage::Undecided }
}

/// A clean page is what its blocks are: zeros, or one aligned page's worth of consecutive blocks, or not decided.
fn on_disk(facts: &RawFile, page: u64) -> TruePage {
    let blocks = blocks(facts, page);
    if page == 0 && facts.inline {
        return TruePage::Undecided;
    }
    if blocks.iter().all(|b| matches!(b, None | Some(RawBlock::Unwritten))) {
        return TruePage::Zero;
    }
    let per_page = PAGE / facts.block_bytes;
    let Some(RawBlock::Data(first)) = blocks[0] else { return TruePage::Undecided };
    let in_a_row = |(i, b): (usize, &Option<RawBlock>)| *b == Some(RawBlock::Data(first + i as u64));
    if !first.is_multiple_of(per_page) || !blocks.iter().enumerate().all(in_a_row) {
        return TruePage::Undecided;
    }
    let object = (facts.fs.0 as u64) << 1 | u64::from(facts.realtime);
    let valid = if facts.size < (page + 1) * PAGE { (facts.size % PAGE) as u32 } else { 0 };
    TruePage::Same { object, page: first / per_page, valid }
}

/// A file under the name that is kept.
type Named<'a> = (&'a PathBuf, &'a Look);

/// Files that were looked at, each once: by first root, there by first path; further names by their own root.
fn distinct<'a>(
    roots: &[PathBuf],
    looks: &'a BTreeMap<PathBuf, Option<Look>>,
) -> (Vec<Vec<Named<'a>>>, Vec<u64>) {
    let root_of = |path: &Path| {
        let above = roots.iter().enumerate().filter(|(_, r)| path.starts_with(r));
        above.max_by_key(|(_, r)| r.components().count()).expect("found below a root").0
    };
    let mut names: BTreeMap<_, Vec<(usize, &PathBuf, &Look)>> = BTreeMap::new();
    for (path, look) in looks {
        if let Some(look) = look {
            names.entry(look.node).or_default().push((root_of(path), path, look));
        }
    }
    let (mut files, mut further) = (vec![Vec::new(); roots.len()], vec![0; roots.len()]);
    for mut names in names.into_values() {
        names.sort_by_key(|(root, path, _)| (*root, *path));
        files[names[0].0].push((names[0].1, names[0].2));
        names[1..].iter().for_each(|(root, _, _)| further[*root] += 1);
    }
    (files, further)
}

/// What a report of `roots` (as reported: path and domain) must say of these looks. Blocks of files that are not
/// `steady`, since they changed after their look, may belong to others by now: their bytes are not compared.
///
/// # Errors
/// Pages that count as equal have other bytes.
pub fn reference<'a>(
    roots: &[(PathBuf, u16)],
    looks: &'a BTreeMap<PathBuf, Option<Look>>,
    by: By<'a>,
    steady: &dyn Fn(&Look) -> bool,
) -> Result<Reference, String> {
    let paths: Vec<PathBuf> = roots.iter().map(|r| r.0.clone()).collect();
    let (files, further) = distinct(&paths, looks);
    let mut contents = match by {
        By::Extents => None,
        By::Bytes(hashed) => Some(Contents::new(hashed, looks)),
    };
    let mut safety: HashMap<TruePage, &[u8]> = HashMap::new();
    let mut undecided = BTreeMap::new();
    let mut truth = Truth { roots: Vec::new() };
    for ((path, domain), files) in roots.iter().zip(&files) {
        let mut root = TrueRoot { path: path.clone(), domain: *domain, files: Vec::new() };
        for (name, look) in files {
            if look.facts.fs != files[0].1.facts.fs {
                return Err(format!("{}: on another file system than its root", name.display()));
            }
            let decided = by_extents(look);
            let open = decided.iter().filter(|p| **p == TruePage::Undecided).count() as u64;
            undecided.insert((*name).clone(), open);
            let mut runs = Vec::new();
            for (at, (page, data)) in decided.iter().zip(&look.facts.pages).enumerate() {
                if steady(look) {
                    check_safe(*page, data, name, &mut safety)?;
                }
                let first = match &mut contents {
                    Some(contents) => contents.page(*page, name, at as u64, data),
                    None => *page,
                };
                runs.push(TrueRun { pages: 1, first });
            }
            let resident = if look.facts.may_ask_cache { &look.facts.cached[..] } else { &[] };
            root.files.push(TrueFile {
                names: vec![(*name).clone()],
                size: look.facts.size,
                runs,
                resident: resident.iter().map(|page| (*page, 1)).collect(),
            });
        }
        truth.roots.push(root);
    }
    let mut expected = truth.expected();
    expected.totals.hard_links = further.iter().sum();
    for (root, further) in expected.roots.iter_mut().zip(further) {
        root.0.hard_links = further;
    }
    Ok(Reference { expected, groups: groups(&truth), undecided })
}

/// The safety property itself: what counts as equal has equal bytes, what counts as zero is zeros.
fn check_safe<'a>(
    page: TruePage,
    data: &'a [u8],
    name: &Path,
    known: &mut HashMap<TruePage, &'a [u8]>,
) -> Result<(), String> {
    let equal = match page {
        TruePage::Undecided => true,
        TruePage::Zero => data.iter().all(|b| *b == 0),
        TruePage::Same { .. } => *known.entry(page).or_insert(data) == data,
    };
    if equal { Ok(()) } else { Err(format!("{}: {page:?} has other bytes elsewhere", name.display())) }
}

/// Equal whole files, best first; the first by root and path stays.
fn groups(truth: &Truth) -> Vec<Group> {
    type Members<'a> = Vec<(usize, &'a TrueFile)>;
    let mut all: HashMap<(u16, u64, Vec<TruePage>), Members<'_>> = HashMap::new();
    for (at, root) in truth.roots.iter().enumerate() {
        for file in &root.files {
            let pages: Vec<TruePage> = file.pages().collect();
            let something = pages.iter().any(|p| *p != TruePage::Zero);
            if something && !pages.contains(&TruePage::Undecided) {
                all.entry((root.domain, file.size, pages)).or_default().push((at, file));
            }
        }
    }
    let mut found: Vec<(u64, usize, Group)> = Vec::new();
    for ((_, _, pages), mut members) in all.into_iter().filter(|(_, m)| m.len() > 1) {
        members.sort_by_key(|(root, file)| (*root, file.names[0].clone()));
        let (mut each, mut resident) = (0, 0);
        for at in (0..pages.len()).filter(|at| pages[*at] != TruePage::Zero) {
            let cached = |file: &TrueFile| file.resident.iter().any(|(page, _)| *page == at as u64);
            each += PAGE;
            resident += (members.iter().filter(|(_, f)| cached(f)).count() as u64).saturating_sub(1) * PAGE;
        }
        let group = Group {
            path: members[0].1.names[0].clone(),
            copies: members.len() as u64,
            cache_bytes_each: each,
            resident_duplicate_bytes: resident,
        };
        found.push(((group.copies - 1) * each, members[0].0, group));
    }
    found.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| (a.1, &a.2.path).cmp(&(b.1, &b.2.path))));
    found.into_iter().map(|f| f.2).collect()
}

fn figures(sizes: &Sizes) -> Figures {
    Figures {
        files: sizes.files,
        hard_links: sizes.hard_links,
        logical_bytes: sizes.logical_bytes,
        cache_bytes: sizes.cache_bytes,
        mergeable_file_bytes: sizes.mergeable_file_bytes,
        mergeable_page_bytes: sizes.mergeable_page_bytes,
        zero_bytes: sizes.zero_bytes,
        undecided_bytes: sizes.undecided_bytes,
        resident_bytes: sizes.resident_bytes,
        resident_duplicate_bytes: sizes.resident_duplicate_bytes,
    }
}

/// Compares every figure.
pub fn compare(report: &ScanReport, wanted: &Reference) -> Result<(), String> {
    same("totals", &figures(&report.totals), &wanted.expected.totals)?;
    for (root, expected) in report.roots.iter().zip(&wanted.expected.roots) {
        let found = (figures(&root.sizes), root.shared_with_others_bytes);
        same(&format!("root {}", root.path.display()), &found, expected)?;
    }
    same("number of roots", &report.roots.len(), &wanted.expected.roots.len())?;
    if let Some(matrix) = &report.matrix {
        same("matrix", matrix, &wanted.expected.matrix)?;
    }
    let named = |f: &pagefold_fsadapters::scan::TopFile| Group {
        path: f.path.to_path_buf(),
        copies: f.copies,
        cache_bytes_each: f.cache_bytes_each,
        resident_duplicate_bytes: f.resident_duplicate_bytes,
    };
    same("top files", &report.top_files.iter().map(named).collect(), &wanted.groups)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, wanted: &T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: found {found:?}, wanted {wanted:?}")) }
}
