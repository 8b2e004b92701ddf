//! A damaged or lost image is made again from manifests: an image is a function of the tree, and its name says whether it came out right.
//!
//! Invariant: what is written has the digest that was asked for; nothing else of the store changes, so uppers and what views wrote in them
//! stay usable. What it deliberately does not do: touch an image that is whole, or heal anchors (their bytes are in no manifest).

use super::delta::delta;
use super::image::{self, BuiltImage};
use super::tree::Tree;
use crate::store::manifest::read_manifest;
use crate::store::{DomainRow, ImageDigest, RootRow, Store, StoreError};

/// Manifests that are tried for one image.
const TRIES: usize = 4;

/// Makes the damaged images among those of `row` again; the digests of those that can't be.
///
/// # Errors
/// The store can't be read or written.
pub fn heal(store: &Store, row: &RootRow, domain: &DomainRow) -> Result<Vec<ImageDigest>, StoreError> {
    let mut lost = Vec::new();
    // The base first: what lies over it is made from it.
    for digest in row.layers.iter().rev().filter(|digest| !is_whole(store, **digest)) {
        match made_again(store, *digest)? {
            Some(built) => {
                tracing::info!("image {digest} was damaged and is made again");
                store.build(domain).write_image(digest, &built.bytes)?;
            }
            None => lost.push(*digest),
        }
    }
    Ok(lost)
}

/// Whether the image is there and its bytes are those of its name.
#[must_use]
pub fn is_whole(store: &Store, digest: ImageDigest) -> bool {
    store.open_image(&digest).is_ok_and(|file| image::verify(&file, digest).is_ok())
}

fn made_again(store: &Store, digest: ImageDigest) -> Result<Option<BuiltImage>, StoreError> {
    let generations = store.generations()?;
    let tree_of = |layers: &[ImageDigest]| -> Option<Tree> {
        let mut of = generations.iter().filter(|g| g.layers == layers).take(TRIES);
        of.find_map(|g| read_manifest(&store.root_dir(g.id, g.generation)).ok())
    };
    for g in generations.iter().filter(|g| g.layers.first() == Some(&digest)).take(TRIES) {
        let Ok(tree) = read_manifest(&store.root_dir(g.id, g.generation)) else { continue };
        let built = match g.layers[1..] {
            [] => image::build(&tree).ok(),
            [base] => tree_of(&[base])
                .and_then(|below| delta(&below, &tree))
                .and_then(|delta| image::build_over(&delta.tree, base).ok()),
            _ => None,
        };
        if let Some(built) = built.filter(|built| built.digest == digest) {
            return Ok(Some(built));
        }
    }
    // A base that no root shows as it is: nothing says what it was.
    Ok(None)
}
