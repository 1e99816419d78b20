//! A `tokenizer.json` is refused, or it is a working tokenizer that is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{files, Encoder};

fuzz_target!(|data: &[u8]| {
    if let Ok((vocab, splitter)) = files::from_json(data) {
        let json = files::to_json(&vocab, splitter.pattern());
        let (again, _) = files::from_json(json.as_bytes()).expect("what is written is read");
        assert_eq!(files::to_ranks(&again), files::to_ranks(&vocab));
        let text = String::from_utf8_lossy(data);
        let encoder = Encoder::new(splitter, vocab);
        let ids = encoder.encode(&text);
        assert_eq!(encoder.vocab().decode(&ids).unwrap(), text.as_bytes());
    }
});
