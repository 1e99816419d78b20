//! Every scanner cuts every text as the regex engine does.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::{Splitter, GPT2_PATTERN, GPT4_PATTERN, PATTERN};

static PAIRS: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
    let pair = |pattern: &str| {
        let scanner = Splitter::new(pattern).unwrap();
        // the same pattern, spelled in a way for which there is no scanner
        let regex = Splitter::new(&format!("(?:{pattern})")).unwrap();
        assert!(scanner.is_scanner() && !regex.is_scanner());
        (scanner, regex)
    };
    [PATTERN, GPT2_PATTERN, GPT4_PATTERN].map(pair).into()
});

fuzz_target!(|text: &str| {
    for (scanner, regex) in PAIRS.iter() {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        scanner.for_each(text, |start, end| one.push((start, end)));
        regex.for_each(text, |start, end| other.push((start, end)));
        assert_eq!(one, other, "{}", scanner.pattern());
    }
});
