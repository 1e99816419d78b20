//! A rank file is refused, or it is a working vocabulary that is written as it was read.
//!
//! A file must hold every byte. The fuzzer would seldom write 256 good lines, so they are there
//! already, unless the first byte says otherwise.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{files, Encoder, Splitter, Vocab, PATTERN};

fuzz_target!(|data: &[u8]| {
    let none: [&str; 0] = [];
    let bytes = Vocab::from_merges(&[], &none).unwrap();
    let mut file = match data.first() {
        Some(0) => Vec::new(),
        _ => files::to_ranks(&bytes).into_bytes(),
    };
    file.extend_from_slice(data);
    if let Ok(vocab) = files::from_ranks(&file, &["<|bos|>"]) {
        let ranks = files::to_ranks(&vocab);
        let again = files::from_ranks(ranks.as_bytes(), &["<|bos|>"]).expect("what is written is read");
        assert_eq!(files::to_ranks(&again), ranks);
        let text = String::from_utf8_lossy(data);
        let encoder = Encoder::new(Splitter::new(PATTERN).unwrap(), vocab);
        let ids = encoder.encode(&text);
        assert_eq!(encoder.vocab().decode(&ids).unwrap(), text.as_bytes());
    }
});
