//! Numbers in LEB128: seven bits a byte, the lowest first, and the high bit where more follow.

/// Appends a number.
pub fn write(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 128 {
        bytes.push(number as u8 | 128);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// The number at the front of some bytes, and how many of them it takes.
#[inline]
pub fn read(bytes: &[u8]) -> (u64, usize) {
    let mut number = 0;
    for (i, &byte) in bytes.iter().enumerate() {
        number |= u64::from(byte & 127) << (7 * i);
        if byte < 128 {
            return (number, i + 1);
        }
    }
    unreachable!("every number that was written has an end")
}
