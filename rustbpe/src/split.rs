use fancy_regex::Regex;

use crate::Error;

/// GPT-4's split pattern, but with numbers cut into groups of at most two digits.
pub const PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Where the regex engine gives up, the next piece is this many characters.
const CHARS_AFTER_GIVING_UP: usize = 1 << 16;

/// Cuts a text into the pieces inside which pairs may merge. The pieces joined are the text.
#[derive(Debug, Clone)]
pub struct Splitter {
    regex: Regex,
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let regex = Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        Ok(Self { regex })
    }

    pub fn pattern(&self) -> &str {
        self.regex.as_str()
    }

    /// Calls `visit` with every piece in order.
    ///
    /// What the pattern leaves out between two matches is a piece too, so that no pattern loses
    /// text. The engine backtracks a bounded number of steps: a million spaces in a row are too
    /// many for [`PATTERN`], and a careless pattern can need exponentially many. There the text
    /// is cut after a fixed number of characters, so that every text has pieces.
    pub fn for_each<'t>(&self, text: &'t str, mut visit: impl FnMut(&'t str)) {
        let mut done = 0; // text[..done] has been visited
        let mut from = 0; // where the search goes on: after `done` where a match was empty
        let characters = |from: usize, n: usize| {
            let rest = &text[from..];
            from + rest.char_indices().nth(n).map_or(rest.len(), |(i, _)| i)
        };
        while from < text.len() {
            let (start, end) = match self.regex.find_from_pos(text, from) {
                Ok(Some(found)) => (found.start(), found.end()),
                Ok(None) => break,
                Err(_) => (done, characters(from, CHARS_AFTER_GIVING_UP)),
            };
            if start == end {
                from = characters(end, 1);
                continue;
            }
            if done < start {
                visit(&text[done..start]);
            }
            visit(&text[start..end]);
            (done, from) = (end, end);
        }
        if done < text.len() {
            visit(&text[done..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        let splitter = Splitter::new(pattern).unwrap();
        splitter.for_each(text, |piece| out.push(piece));
        out
    }

    #[test]
    fn words_numbers_and_space() {
        assert_eq!(
            pieces(PATTERN, "It's 2026,  she'LL wait!\n\n ok "),
            ["It", "'s", " ", "20", "26", ",", " ", " she", "'LL", " wait", "!\n\n", " ok", " "]
        );
        assert_eq!(pieces(PATTERN, "a \n \n  b"), ["a", " \n \n", " ", " b"]);
        assert!(pieces(PATTERN, "").is_empty());
    }

    #[test]
    fn gaps_between_matches_are_pieces() {
        assert_eq!(pieces("b+", "abbac"), ["a", "bb", "ac"]);
        assert_eq!(pieces("b*", "abbac"), ["a", "bb", "ac"]);
    }

    #[test]
    fn a_broken_pattern_is_an_error() {
        assert!(matches!(Splitter::new("(a"), Err(Error::Pattern(_))));
    }

    #[test]
    fn a_pattern_that_explodes_still_ends() {
        let text = "a".repeat(200_000);
        assert_eq!(pieces(r"(?:a+)+(?!a)b", &text).concat(), text);
    }

    #[test]
    fn very_long_runs() {
        for unit in [" ", "a", "1", "!", "\n", "é", " \u{3000}"] {
            let text = unit.repeat(3_000_000);
            let total: usize = pieces(PATTERN, &text).iter().map(|p| p.len()).sum();
            assert_eq!(total, text.len());
        }
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_text(text in any::<String>()) {
            prop_assert_eq!(pieces(PATTERN, &text).concat(), text);
        }
    }
}
