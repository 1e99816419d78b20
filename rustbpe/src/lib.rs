//! Byte-pair encoding: training, encoding and decoding.
//!
//! A text is cut into pieces by a pattern ([`Splitter`]), and pairs of neighbouring ids are merged
//! inside the pieces only. In the order in which a reader meets them: `unicode` and `scan` (what a
//! piece is), `count` and `train` (which pairs to merge), `pairs`, `merge` and `vocab` (merging a
//! piece), `key`, `cache` and `encode` (whole texts, fast), `files` (what is kept on disk).
//!
//! The modules know nothing of Python; the bindings (feature `python`) are one thin file.

#![forbid(unsafe_code)]

mod cache;
mod count;
mod encode;
mod error;
pub mod files;
mod key;
mod merge;
mod pairs;
#[cfg(feature = "python")]
mod python;
mod scan;
mod split;
mod train;
mod unicode;
mod unicode_table;
mod varint;
mod vocab;

pub use count::{Counter, Counts};
pub use encode::{Batch, Encoder, Ids, Options};
pub use error::Error;
pub use scan::{GPT2_PATTERN, GPT4_PATTERN, PATTERN};
pub use split::Splitter;
pub use train::train;
pub use vocab::{Pair, Vocab, MAX_TOKEN_BYTES, MAX_VOCAB_SIZE};

/// What a mutex guards; a thread that failed while it held the lock fails by itself.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A hash of bytes.
fn hash(bytes: &[u8]) -> u64 {
    use std::hash::Hasher;
    let mut hasher = rustc_hash::FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}
