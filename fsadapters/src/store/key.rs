//! Names of things in a store.

use std::fmt;

/// Bytes as lower-case hex.
fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

/// Bytes of lower-case hex; `None` for anything else.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N || digits.iter().any(|d| !matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

macro_rules! bytes_name {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// From lower-case hex; `None` for anything else.
            #[must_use]
            pub fn from_hex(text: &str) -> Option<Self> {
                unhex(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

bytes_name!(
    /// An anchor. Made from the store's id and a number that is never used twice, so it never names two contents; it says
    /// nothing about the bytes and proves nothing.
    AnchorKey, 32
);
bytes_name!(
    /// BLAKE3 of an image's bytes, with the superblock's UUID taken as zeros (the UUID is set from it).
    ImageDigest, 32
);
bytes_name!(
    /// Size and extents of a file, hashed: equal signatures are a reason to look, never a proof (design 5.5).
    Signature, 16
);
bytes_name!(
    /// BLAKE3 of a file's bytes.
    ContentHash, 32
);
bytes_name!(
    /// A store. Random, made once.
    StoreId, 16
);

impl AnchorKey {
    /// The anchor of number `serial` in store `store`.
    #[must_use]
    pub fn of(store: StoreId, serial: u64) -> AnchorKey {
        let mut hasher = blake3::Hasher::new_derive_key("pagefold anchor key 1");
        hasher.update(&store.0);
        hasher.update(&serial.to_le_bytes());
        AnchorKey(*hasher.finalize().as_bytes())
    }

    /// Where it lies below its domain's directory: `xx/<62 hex digits>`, as overlayfs finds it through
    /// `trusted.overlay.redirect`.
    #[must_use]
    pub fn path(&self) -> String {
        // By hand: asked for every anchor that is opened, and the formatter takes as long as the open.
        let mut text = String::with_capacity(65);
        for (at, byte) in self.0.iter().enumerate() {
            if at == 1 {
                text.push('/');
            }
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
            }
        }
        text
    }
}

/// A sealed root within its store; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct SealId(pub u64);

impl fmt::Display for SealId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_to_text_and_back() {
        let key = AnchorKey::of(StoreId([7; 16]), 1);
        assert_eq!(AnchorKey::from_hex(&key.to_string()), Some(key));
        assert_eq!(key.path().len(), 65);
        assert_eq!(key.path().replace('/', ""), key.to_string());
        assert_ne!(key, AnchorKey::of(StoreId([7; 16]), 2));
        assert_ne!(key, AnchorKey::of(StoreId([8; 16]), 1));
        for bad in ["", "0", "zz", "+f", "0A", &"0".repeat(65)] {
            assert_eq!(AnchorKey::from_hex(bad), None, "{bad}");
        }
    }
}
