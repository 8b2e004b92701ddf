//! What the tests of commit share.

pub mod fixture;
pub mod ops;
pub mod snapshot;
