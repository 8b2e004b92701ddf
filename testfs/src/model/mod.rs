//! The reference model: what every reader of every file and mapping must see, from raw facts alone.
//!
//! Invariant: nothing here knows of extents, caches, sharing, protections or the engine. A page is what was written to
//! it or inherited, version by version; that is all. So the model can't make the same mistake as what it judges.

use std::collections::BTreeMap;

use pagefold_engine::units::{MappingId, PageIndex, Site};

use crate::sim::NodeId;

/// Something that was done to bytes. Recorded by whoever did it, when it was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// Bytes were written to a file.
    Written {
        /// Which.
        file: NodeId,
        /// At which byte.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A file's size was set.
    Cut {
        /// Which.
        file: NodeId,
        /// Bytes.
        size: u64,
    },
    /// `to` inherited all bytes of `from`.
    Cloned {
        /// From which.
        from: NodeId,
        /// To which.
        to: NodeId,
    },
    /// A mapping came to be; of a file, privately, or anonymous.
    Mapped {
        /// Which.
        mapping: MappingId,
        /// Of what.
        file: Option<NodeId>,
    },
    /// Bytes were stored to a page of a mapping.
    Stored {
        /// Where.
        site: Site,
        /// Byte in the page.
        offset: usize,
        /// What.
        bytes: Vec<u8>,
    },
    /// A child inherited all pages of its parent.
    Forked {
        /// From.
        parent: MappingId,
        /// To.
        child: MappingId,
    },
    /// A mapping is gone.
    Exited {
        /// Which.
        mapping: MappingId,
    },
}

/// A page's bytes and the facts (by number) that made them.
#[derive(Clone, Debug)]
struct Version {
    bytes: Vec<u8>,
    by: Vec<u64>,
}

#[derive(Clone, Debug, Default)]
struct FileModel {
    size: u64,
    pages: BTreeMap<u64, Version>,
}

#[derive(Clone, Debug)]
struct MappingModel {
    file: Option<NodeId>,
    own: BTreeMap<u64, Version>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Model {
    page_bytes: usize,
    files: BTreeMap<NodeId, FileModel>,
    mappings: BTreeMap<MappingId, MappingModel>,
    facts: u64,
}

impl Model {
    /// A world in which nothing was written yet.
    #[must_use]
    pub fn new(page_bytes: usize) -> Model {
        Model { page_bytes, files: BTreeMap::new(), mappings: BTreeMap::new(), facts: 0 }
    }

    /// Takes one fact.
    pub fn take(&mut self, fact: Fact) {
        self.facts += 1;
        match fact {
            Fact::Written { file, offset, bytes } => self.written(file, offset, &bytes),
            Fact::Cut { file, size } => self.cut(file, size),
            Fact::Cloned { from, to } => {
                let source = self.files.get(&from).cloned().unwrap_or_default();
                self.files.insert(to, source);
            }
            Fact::Mapped { mapping, file } => {
                self.mappings.insert(mapping, MappingModel { file, own: BTreeMap::new() });
            }
            Fact::Stored { site, offset, bytes } => self.stored(site, offset, &bytes),
            Fact::Forked { parent, child } => {
                let copy = self.mappings[&parent].clone();
                self.mappings.insert(child, copy);
            }
            Fact::Exited { mapping } => drop(self.mappings.remove(&mapping)),
        }
    }

    fn written(&mut self, file: NodeId, offset: u64, bytes: &[u8]) {
        let (page_bytes, fact) = (self.page_bytes, self.facts);
        let file = self.files.entry(file).or_default();
        file.size = file.size.max(offset + bytes.len() as u64);
        for (i, byte) in bytes.iter().enumerate() {
            let at = offset as usize + i;
            let page = file.pages.entry((at / page_bytes) as u64).or_insert_with(|| blank(page_bytes));
            page.bytes[at % page_bytes] = *byte;
            if page.by.last() != Some(&fact) {
                page.by.push(fact);
            }
        }
    }

    fn cut(&mut self, id: NodeId, size: u64) {
        let (page_bytes, fact) = (self.page_bytes as u64, self.facts);
        let file = self.files.entry(id).or_default();
        file.size = size;
        let end = size.div_ceil(page_bytes);
        file.pages.split_off(&end);
        if let Some(last) = file.pages.get_mut(&(size / page_bytes)) {
            last.bytes[(size % page_bytes) as usize..].fill(0);
            last.by.push(fact);
        }
        for mapping in self.mappings.values_mut().filter(|m| m.file == Some(id)) {
            mapping.own.split_off(&end);
        }
    }

    fn stored(&mut self, site: Site, offset: usize, bytes: &[u8]) {
        let before = self.expected(site).unwrap_or_else(|| vec![0; self.page_bytes]);
        let fact = self.facts;
        let Some(mapping) = self.mappings.get_mut(&site.mapping) else { return };
        let page =
            mapping.own.entry(site.offset.0).or_insert_with(|| Version { bytes: before, by: Vec::new() });
        page.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        page.by.push(fact);
    }

    /// What a reader of `site` must see; `None` past EOF, or when the mapping is gone.
    #[must_use]
    pub fn expected(&self, site: Site) -> Option<Vec<u8>> {
        let mapping = self.mappings.get(&site.mapping)?;
        if let Some(own) = mapping.own.get(&site.offset.0) {
            return Some(own.bytes.clone());
        }
        match mapping.file {
            None => Some(vec![0; self.page_bytes]),
            Some(file) => self.file_page(file, site.offset),
        }
    }

    /// What a reader of a file must see at a page; `None` past EOF.
    #[must_use]
    pub fn file_page(&self, file: NodeId, page: PageIndex) -> Option<Vec<u8>> {
        let model = self.files.get(&file)?;
        if page.0 * self.page_bytes as u64 >= model.size {
            return None;
        }
        Some(model.pages.get(&page.0).map_or_else(|| vec![0; self.page_bytes], |v| v.bytes.clone()))
    }

    /// Size of a file in bytes.
    #[must_use]
    pub fn file_size(&self, file: NodeId) -> u64 {
        self.files.get(&file).map_or(0, |f| f.size)
    }

    /// Whose bytes these are, for the message when a reader sees bytes it should not.
    #[must_use]
    pub fn whose(&self, bytes: &[u8]) -> String {
        let of_mapping = self.mappings.iter().flat_map(|(id, m)| {
            m.own
                .iter()
                .filter(|(_, v)| v.bytes == bytes)
                .map(move |(p, v)| format!("mapping {id} page {p}, facts {:?}", v.by))
        });
        let of_file = self.files.iter().flat_map(|(id, f)| {
            f.pages
                .iter()
                .filter(|(_, v)| v.bytes == bytes)
                .map(move |(p, v)| format!("{id:?} page {p}, facts {:?}", v.by))
        });
        let all: Vec<String> = of_mapping.chain(of_file).take(4).collect();
        if all.is_empty() { "nobody's now".to_owned() } else { all.join("; ") }
    }
}

fn blank(page_bytes: usize) -> Version {
    Version { bytes: vec![0; page_bytes], by: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_detaches_a_page_from_its_file_and_a_cut_takes_it_away() {
        let (file, mapping) = (NodeId(1), MappingId(1));
        let site = Site { mapping, offset: PageIndex(0) };
        let mut model = Model::new(8);
        model.take(Fact::Written { file, offset: 0, bytes: vec![1; 12] });
        model.take(Fact::Mapped { mapping, file: Some(file) });
        model.take(Fact::Stored { site, offset: 2, bytes: vec![9] });
        model.take(Fact::Written { file, offset: 0, bytes: vec![2; 8] });
        assert_eq!(model.expected(site), Some(vec![1, 1, 9, 1, 1, 1, 1, 1]));
        assert_eq!(model.file_page(file, PageIndex(1)), Some(vec![1, 1, 1, 1, 0, 0, 0, 0]));
        model.take(Fact::Cut { file, size: 0 });
        assert_eq!(model.expected(site), None);
        model.take(Fact::Cut { file, size: 3 });
        assert_eq!(model.expected(site), Some(vec![0; 8]));
    }
}
