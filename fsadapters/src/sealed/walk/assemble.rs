//! What the threads found, put together to trees.
//!
//! Invariant: of several listings of one directory only the last counts, with all that was found under it. The order in which
//! threads found things never shows.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

use super::{Child, Haul, Sketch, WalkError};
use crate::sealed::tree::{Entry, EntryId, InodeIndex, Node, Tree};

pub(super) struct Gathered<F> {
    roots: Vec<Found<F>>,
}

/// A directory with the number of its own listing, or something else.
type Hung<F> = (Option<u32>, Child<F>);

struct Found<F> {
    /// The root directory's last listing.
    top: Option<(u32, Child<F>)>,
    /// Listing -> what hangs in it: a directory with the number of its own listing, or something else.
    children: FxHashMap<u32, Vec<Hung<F>>>,
    unsettled: Vec<(u32, PathBuf)>,
    error: Option<WalkError>,
}

impl<F> Gathered<F> {
    pub fn new(roots: usize) -> Self {
        let none = || Found { top: None, children: HashMap::default(), unsettled: Vec::new(), error: None };
        Gathered { roots: (0..roots).map(|_| none()).collect() }
    }

    /// Takes over what one thread found.
    pub fn take(&mut self, haul: Haul<F>) {
        for (root, error) in haul.errors {
            let slot = &mut self.roots[root].error;
            // One is told; by path, so that it is not the threads' luck which.
            if slot.as_ref().is_none_or(|known| error.to_string() < known.to_string()) {
                *slot = Some(error);
            }
        }
        for (root, number, parent, child) in haul.dirs {
            let found = &mut self.roots[root];
            match parent {
                Some(parent) => found.children.entry(parent).or_default().push((Some(number), child)),
                None if found.top.as_ref().is_none_or(|(known, _)| *known < number) => {
                    found.top = Some((number, child));
                }
                None => {}
            }
        }
        for (root, parent, children) in haul.children {
            let of = self.roots[root].children.entry(parent).or_default();
            of.extend(children.into_iter().map(|child| (None, child)));
        }
        for (root, number, path) in haul.unsettled {
            self.roots[root].unsettled.push((number, path));
        }
    }

    /// One result a root, in order; several at a time.
    pub fn into_sketches(self, threads: usize) -> Vec<Result<Sketch<F>, WalkError>>
    where
        F: Send,
    {
        let mut done: Vec<Option<Result<Sketch<F>, WalkError>>> = self.roots.iter().map(|_| None).collect();
        let tasks = Mutex::new(self.roots.into_iter().zip(&mut done));
        let work = || {
            loop {
                let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((found, slot)) = next else { return };
                *slot = Some(found.into_sketch());
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        done.into_iter().map(|sketch| sketch.unwrap_or(Err(WalkError::Cancelled))).collect()
    }
}

impl<F> Found<F> {
    fn into_sketch(mut self) -> Result<Sketch<F>, WalkError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        // Without a listing and without an error the walk was stopped.
        let Some((number, top)) = self.top.take() else { return Err(WalkError::Cancelled) };
        let mut sketch = Sketch { tree: Tree::default(), found: Vec::new(), unsettled: Vec::new() };
        let mut links: FxHashMap<u64, InodeIndex> = HashMap::default();
        let mut queue = std::collections::VecDeque::from([(number, EntryId(0))]);
        let mut alive = Vec::new();
        sketch.add(EntryId(0), top, &mut links)?;
        while let Some((number, parent)) = queue.pop_front() {
            alive.push(number);
            let mut children = self.children.remove(&number).unwrap_or_default();
            // A directory listed again is here twice: its later listing comes first and is kept.
            children.sort_unstable_by(|(a, x), (b, y)| x.name.cmp(&y.name).then(b.cmp(a)));
            children.dedup_by(|later, first| later.1.name == first.1.name);
            for (number, child) in children {
                let entry = sketch.add(parent, child, &mut links)?;
                queue.extend(number.map(|number| (number, entry)));
            }
        }
        alive.sort_unstable();
        self.unsettled.retain(|(number, _)| alive.binary_search(number).is_ok());
        sketch.unsettled = self.unsettled.into_iter().map(|(_, path)| path).collect();
        sketch.unsettled.sort_unstable();
        Ok(sketch)
    }
}

impl<F> Sketch<F> {
    fn add(
        &mut self,
        parent: EntryId,
        child: Child<F>,
        links: &mut FxHashMap<u64, InodeIndex>,
    ) -> Result<EntryId, WalkError> {
        let number = |count: usize| {
            let too_many = "a root of more than four thousand million entries can't be sealed";
            u32::try_from(count).map_err(|_| WalkError::Refused { path: PathBuf::new(), why: too_many })
        };
        let entry = EntryId(number(self.tree.entries.len())?);
        let next = InodeIndex(number(self.tree.inodes.len())?);
        let linked = child.inode.raw.links > 1 && child.inode.node != Node::Dir;
        let inode = if linked { *links.entry(child.inode.raw.ino).or_insert(next) } else { next };
        if inode == next {
            self.tree.inodes.push(child.inode);
            self.found.push(child.found);
        }
        self.tree.entries.push(Entry { parent, name: child.name, inode });
        Ok(entry)
    }
}
