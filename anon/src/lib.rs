//! Anonymous memory: the place of pagefold's third backend.
//!
//! Here will be what merges memory that belongs to no file: reading and steering the kernel's own KSM (estimate, enable
//! per process or control group, honest profit), and an arena that a program hands to pagefold, merged by the engine
//! through its [`MergeHost`](pagefold_engine::host::MergeHost) with userfaultfd around the swap of a page.
//!
//! Until then it is empty on purpose. The engine knows anonymous pages already: in simulation they merge with each other
//! and with file pages, so that nothing file-only creeps into it. Invariant: this crate and `fsadapters` don't know each
//! other; what they have in common is the engine.
#![forbid(unsafe_code)]
