//! Rows as bytes: one byte of row version, then `postcard`.
//!
//! Invariant: [`decode`] gives back exactly what [`encode`] was given, or an error: an unknown version, bytes that don't decode and
//! bytes left over are all told, never guessed at.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A kind of row: its version, and the name that messages use.
pub(super) trait Row: Serialize + DeserializeOwned {
    const VERSION: u8;
    const WHAT: &'static str;
}

macro_rules! rows {
    ($($row:ty, $version:literal, $what:literal;)*) => {
        $(impl Row for $row {
            const VERSION: u8 = $version;
            const WHAT: &'static str = $what;
        })*
    };
}

rows! {
    super::rows::DomainRow, 1, "domain";
    super::rows::AnchorRow, 2, "anchor";
    super::rows::RootRow, 1, "root";
    super::rows::ViewRow, 1, "view";
    super::index::StoredImage, 1, "image";
    super::index::Identity, 1, "store";
    super::index::Generation, 2, "generation";
    super::index::Grave, 1, "removal";
}

pub(super) fn encode<R: Row>(row: &R) -> Vec<u8> {
    postcard::to_extend(row, vec![R::VERSION]).expect("rows are plain data: a Vec takes them all")
}

pub(super) fn decode<R: Row>(bytes: &[u8]) -> Result<R, String> {
    let Some((&version, body)) = bytes.split_first() else { return Err(format!("an empty {} row", R::WHAT)) };
    if version != R::VERSION {
        return Err(format!(
            "a {} row of version {version}, this pagefold knows version {}",
            R::WHAT,
            R::VERSION
        ));
    }
    match postcard::take_from_bytes::<R>(body) {
        Ok((row, [])) => Ok(row),
        Ok((_, rest)) => Err(format!("a {} row with {} bytes left over", R::WHAT, rest.len())),
        Err(e) => Err(format!("a {} row that is not understood: {e}", R::WHAT)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::DomainRow;
    use super::*;

    #[test]
    fn a_row_comes_back_and_anything_else_is_told() {
        let row = DomainRow { id: 7, name: "d".into() };
        let bytes = encode(&row);
        assert_eq!(decode::<DomainRow>(&bytes), Ok(row));
        for cut in 0..bytes.len() {
            assert!(decode::<DomainRow>(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode::<DomainRow>(&longer).unwrap_err().contains("left over"));
        let mut newer = bytes;
        newer[0] = 2;
        assert!(decode::<DomainRow>(&newer).unwrap_err().contains("version 2"));
        // A length far beyond the input must neither allocate nor panic.
        assert!(decode::<DomainRow>(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]).is_err());
    }
}
