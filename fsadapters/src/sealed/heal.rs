//! A damaged or lost image is made again from manifests: an image is a function of the tree, and its name says whether it came out right.
//!
//! Invariant: what is written has the digest that was asked for; nothing else of the store changes, so uppers and what views wrote in them
//! stay usable. What it deliberately does not do: touch an image that is whole, or heal anchors (their bytes are in no manifest).

use super::image::{self, BuiltImage};
use crate::store::manifest::read_manifest;
use crate::store::{DomainRow, ImageDigest, RootRow, SealedGeneration, Store, StoreError};

/// Manifests that are tried for one image.
const TRIES: usize = 4;

/// Makes the damaged images among those of `row` again; the digests of those that can't be.
///
/// # Errors
/// The store can't be read or written.
pub fn heal(store: &Store, row: &RootRow, domain: &DomainRow) -> Result<Vec<ImageDigest>, StoreError> {
    let mut lost = Vec::new();
    for digest in row.layers.iter().filter(|digest| !is_whole(store, **digest)) {
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
    let whole = |g: &&SealedGeneration| g.layers == [digest] && !g.has_diff;
    for g in generations.iter().filter(whole).take(TRIES) {
        let Ok(tree) = read_manifest(&store.root_dir(g.id, g.generation)) else { continue };
        let built = image::build(&tree).ok();
        if let Some(built) = built.filter(|built| built.digest == digest) {
            return Ok(Some(built));
        }
    }
    // No root shows it as it is: nothing says what it was.
    Ok(None)
}
