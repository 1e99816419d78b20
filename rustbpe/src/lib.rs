//! Byte-pair encoding: training, encoding and decoding.
//!
//! A text is split into pieces by a regular expression ([`Splitter`]), and pairs of neighbouring
//! ids are merged inside the pieces only. Ids 0..=255 are the bytes; merge `k` makes id `256 + k`.
//! The modules know nothing of Python; the bindings (feature `python`) are one thin file.

mod bpe;
mod error;
#[cfg(feature = "python")]
mod python;
mod split;
mod train;

pub use bpe::{Bpe, Pair, MAX_TOKEN_BYTES, MAX_VOCAB_SIZE};
pub use error::Error;
pub use split::{Splitter, PATTERN};
pub use train::{count_pieces, train, PieceCounts};
