use std::fmt;

/// What can be wrong with what the caller gave; each message is one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The pattern is no regular expression.
    Pattern(String),
    /// The vocabulary is smaller than the 256 bytes, or absurdly large.
    VocabSize(usize),
    /// Tokens or merges that no training could have made.
    Tokens(String),
    /// A file that is not what its name says.
    File(String),
    /// An id that the vocabulary does not have.
    Id { id: u32, vocab_size: usize },
    /// The training text has too many different pieces.
    TooManyPieces,
    /// Training was told to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern(why) => {
                write!(f, "the split pattern is not a regular expression: {why}")
            }
            Error::VocabSize(size) => write!(
                f,
                "vocab_size must be from 256 (the bytes) to {}, not {size}",
                crate::MAX_VOCAB_SIZE
            ),
            Error::Tokens(why) | Error::File(why) => write!(f, "{why}"),
            Error::Id { id, vocab_size } => {
                write!(f, "id {id} is outside the vocabulary of {vocab_size}")
            }
            Error::TooManyPieces => write!(
                f,
                "the text has more than four billion bytes of different pieces: train on less of it"
            ),
            Error::Interrupted => write!(f, "training was interrupted"),
        }
    }
}

impl std::error::Error for Error {}
