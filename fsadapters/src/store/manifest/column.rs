//! Columns of numbers and bytes: LEB128, differences by zigzag.
//!
//! Invariant: reading past the end or a number that doesn't fit is [`Damage::Short`], never a panic.

use super::Damage;

/// A column being written.
#[derive(Debug, Default)]
pub(super) struct Column {
    pub bytes: Vec<u8>,
    last: i128,
}

impl Column {
    pub fn number(&mut self, value: u128) {
        let mut rest = value;
        loop {
            let low = (rest & 0x7f) as u8;
            rest >>= 7;
            self.bytes.push(if rest == 0 { low } else { low | 0x80 });
            if rest == 0 {
                return;
            }
        }
    }

    /// As the difference to the one before.
    pub fn ascending(&mut self, value: i128) {
        let difference = value.wrapping_sub(self.last);
        self.last = value;
        self.number(((difference << 1) ^ (difference >> 127)) as u128);
    }

    pub fn text(&mut self, lengths: &mut Column, bytes: &[u8]) {
        lengths.number(bytes.len() as u128);
        self.bytes.extend(bytes);
    }
}

/// A column being read.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    last: i128,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, last: 0 }
    }

    /// Bytes left: no more numbers than that can follow.
    pub fn left(&self) -> usize {
        self.bytes.len()
    }

    pub fn take(&mut self, length: usize) -> Result<&'a [u8], Damage> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(Damage::Short)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn wide(&mut self) -> Result<u128, Damage> {
        let (mut value, mut shift) = (0u128, 0u32);
        loop {
            let [byte, rest @ ..] = self.bytes else { return Err(Damage::Short) };
            self.bytes = rest;
            let low = u128::from(byte & 0x7f);
            if shift > 126 || (low << shift) >> shift != low {
                return Err(Damage::Short);
            }
            value |= low << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
            shift += 7;
        }
    }

    pub fn number<T: TryFrom<u128>>(&mut self) -> Result<T, Damage> {
        T::try_from(self.wide()?).map_err(|_| Damage::Short)
    }

    pub fn ascending<T: TryFrom<i128>>(&mut self) -> Result<T, Damage> {
        let coded = self.wide()?;
        let difference = ((coded >> 1) as i128) ^ -((coded & 1) as i128);
        self.last = self.last.wrapping_add(difference);
        T::try_from(self.last).map_err(|_| Damage::Short)
    }

    pub fn text(&mut self, lengths: &mut Reader<'_>) -> Result<&'a [u8], Damage> {
        let length = lengths.number()?;
        self.take(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_there_and_back() {
        let values =
            [0i128, 1, -1, 127, 128, -300, i64::MAX.into(), i64::MIN.into(), i128::MAX, i128::MIN, 5];
        let (mut plain, mut differences) = (Column::default(), Column::default());
        for value in values {
            plain.number(value as u128);
            differences.ascending(value);
        }
        let (mut plain, mut differences) = (Reader::new(&plain.bytes), Reader::new(&differences.bytes));
        for value in values {
            assert_eq!(plain.number::<u128>(), Ok(value as u128));
            assert_eq!(differences.ascending::<i128>(), Ok(value));
        }
        assert_eq!((plain.left(), differences.left()), (0, 0));
    }

    #[test]
    fn what_does_not_fit_is_damage() {
        assert_eq!(Reader::new(&[0x80]).number::<u64>(), Err(Damage::Short));
        assert_eq!(Reader::new(&[0xff; 30]).number::<u128>(), Err(Damage::Short));
        assert_eq!(Reader::new(&[0x80, 0x02]).number::<u8>(), Err(Damage::Short));
        assert_eq!(Reader::new(&[1]).take(2), Err(Damage::Short));
    }
}
