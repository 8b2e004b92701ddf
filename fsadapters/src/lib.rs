//! Files as pagefold sees them.
//!
//! [`source`] is the one narrow seam between analysis and a file system; the `os` module answers it from the kernel, the
//! simulation from memory, and a fault injector wraps either. `scan` walks roots through it and fills the engine's
//! share map.
#![forbid(unsafe_code)]

pub mod doctor;
pub mod fsid;
pub mod memcg;
pub mod mountinfo;
pub mod os;
pub mod overlay;
pub mod reader;
pub mod reflink;
mod regular;
pub mod residency;
pub mod scan;
pub mod sealed;
pub mod source;
pub mod store;
mod turnstile;
