//! Sealed views: container roots whose equal files are one file to the page cache (design section 6).
//!
//! A root is *sealed*: a metadata image (EROFS) is made of it, whose regular files point at anchors. Its *view* is an overlay
//! mount of an upper of its own, the image and the domain's anchors. The kernel breaks sharing: the first write to a file
//! copies it up, which is a reflink.
//!
//! ```text
//! walk -> identity -> anchor hit proved | anchor made -> tree -> image -> published          seal
//! image mounted once -> overlay of upper, image, anchors -> moved to the target              mount
//! upper -> plan -> reflinked beside the target, fsync, rename -> upper emptied               commit
//! ```
//!
//! Invariant: a raw root is never written by anything here but `commit` (and FIDEDUPERANGE under `--content`, which changes no
//! byte). A view shows for every file bytes that the file held at one moment while it was sealed.

pub mod assemble;
mod bytes;
pub mod commit;
pub mod commit_root;
pub mod compare;
pub mod copy_out;
pub mod delta;
pub mod diff;
pub mod explain;
pub mod export;
pub mod heal;
pub mod idmap;
pub mod image;
pub mod image_mount;
pub mod inode;
pub mod live;
mod locate;
pub mod mount;
mod opened;
pub mod prefault;
mod prove;
pub mod raw;
pub(crate) mod reading;
mod refuse;
pub mod remains;
pub mod report;
pub mod seal;
pub mod status;
pub mod tree;
mod unmount;
pub mod unseal;
pub mod upper;
pub mod users;
pub mod view_error;
pub mod walk;
mod workshop;
mod xattrs;
