//! Short pieces as numbers: comparing two words of sixteen bytes takes two instructions.

/// A piece of at most [`Key::MAX`] bytes, with its length in the last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Key(u64, u64);

impl Key {
    pub const MAX: usize = 15;

    /// The key of `text[start..end]`, which has at most [`Key::MAX`] bytes.
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, end: usize) -> Self {
        let length = end - start;
        let sixteen = match text.get(start..).and_then(|rest| rest.first_chunk()) {
            Some(sixteen) => *sixteen,
            None => {
                let mut sixteen = [0; 16];
                sixteen[..length].copy_from_slice(&text[start..end]);
                sixteen
            }
        };
        let bytes = u128::from_le_bytes(sixteen);
        let (low, high) = (bytes as u64, (bytes >> 64) as u64);
        let [low_mask, high_mask] = MASKS[length & 15];
        Self(low & low_mask, high & high_mask | (length as u64) << 56)
    }

    /// The piece.
    pub fn bytes(&self) -> ([u8; 16], usize) {
        let bytes = u128::from(self.0) | u128::from(self.1) << 64;
        (bytes.to_le_bytes(), (self.1 >> 56) as usize)
    }

    /// A hash all of whose bits depend on all of the piece.
    #[inline(always)]
    pub fn hash(&self) -> u64 {
        let low = self.0 ^ 0x9E37_79B9_7F4A_7C15;
        let high = self.1 ^ 0xE703_7ED1_A0B4_28DB;
        let product = u128::from(low) * u128::from(high);
        product as u64 ^ (product >> 64) as u64
    }
}

/// For every length the bytes that belong to the piece.
const MASKS: [[u64; 2]; 16] = {
    let mut masks = [[0; 2]; 16];
    let mut length = 1;
    while length < 16 {
        let bytes = u128::MAX >> (128 - 8 * length);
        masks[length] = [bytes as u64, (bytes >> 64) as u64];
        length += 1;
    }
    masks
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_key_is_its_piece(text in prop::collection::vec(any::<u8>(), 0..40), start in 0usize..40, length in 0usize..=Key::MAX) {
            let start = start.min(text.len());
            let end = (start + length).min(text.len());
            let key = Key::new(&text, start, end);
            let (bytes, n) = key.bytes();
            prop_assert_eq!(&bytes[..n], &text[start..end]);
            let mut alone = text[start..end].to_vec();
            prop_assert_eq!(Key::new(&alone, 0, n), key);
            alone.extend_from_slice(&[255; 16]);
            prop_assert_eq!(Key::new(&alone, 0, n), key);
        }
    }
}
