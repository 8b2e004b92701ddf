//! What a scan could not count, by path: bounded, whatever a tree holds.

use std::path::PathBuf;

/// The most entries a list keeps; a further line then says how many more there were.
pub const NOTES_MAX: usize = 10_000;

/// The most bytes of paths a list keeps: below a deep chain of directories each path is megabytes long.
const NOTE_BYTES_MAX: usize = 16 << 20;

/// A path and what is to be said of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// As found: the root as given, then the names below it.
    pub path: PathBuf,
    /// For a person.
    pub text: String,
}

/// A bounded list of notes.
#[derive(Debug, Default)]
pub struct NoteList {
    notes: Vec<Note>,
    bytes: usize,
    more: u64,
}

impl NoteList {
    /// Adds one, or only counts it when the list is full.
    pub fn add(&mut self, path: PathBuf, text: impl Into<String>) {
        let bytes = self.bytes + path.as_os_str().len();
        if self.notes.len() < NOTES_MAX && bytes <= NOTE_BYTES_MAX {
            self.bytes = bytes;
            self.notes.push(Note { path, text: text.into() });
        } else {
            self.more += 1;
        }
    }

    /// Takes over another list's notes.
    pub fn append(&mut self, other: NoteList) {
        for note in other.notes {
            self.add(note.path, note.text);
        }
        self.more += other.more;
    }

    /// The notes by path; if there were too many, a last one without a path says so.
    #[must_use]
    pub fn into_sorted(mut self) -> Vec<Note> {
        self.notes.sort();
        if self.more > 0 {
            let text = format!("{} more like these are not listed", self.more);
            self.notes.push(Note { path: PathBuf::new(), text });
        }
        self.notes
    }
}

/// The two channels of a scan's bad news.
#[derive(Debug, Default)]
pub struct Notes {
    /// Left out on purpose; nothing is missing from the figures because of it.
    pub skipped: NoteList,
    /// The figures lack something because of it: the exit code says so.
    pub errors: NoteList,
}

impl Notes {
    /// Takes over another's.
    pub fn append(&mut self, other: Notes) {
        self.skipped.append(other.skipped);
        self.errors.append(other.errors);
    }
}
