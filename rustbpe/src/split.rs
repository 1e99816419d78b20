//! Cutting a text into the pieces inside which pairs may merge.

use fancy_regex::Regex;

use crate::scan::{safe_cut, Scanner};
use crate::Error;

/// Where the regex engine gives up, the next piece is this many characters.
const CHARS_AFTER_GIVING_UP: usize = 1 << 16;

/// Cuts a text into pieces. The pieces joined are the text.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    Scanner(Scanner),
    Regex(Box<Regex>),
}

impl Splitter {
    /// The splitter for a pattern: a scanner where there is one, otherwise a regex engine.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match Scanner::of(pattern) {
            Some(scanner) => Engine::Scanner(scanner),
            None => Engine::Regex(Box::new(
                Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?,
            )),
        };
        Ok(Self {
            pattern: pattern.to_owned(),
            engine,
        })
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Whether the pattern has a scanner. A regex engine is about ten times slower.
    pub fn is_scanner(&self) -> bool {
        matches!(self.engine, Engine::Scanner(_))
    }

    /// Calls `visit` with the start and the end of every piece, in order.
    #[inline(always)]
    pub fn for_each(&self, text: &str, visit: impl FnMut(usize, usize)) {
        match &self.engine {
            Engine::Scanner(scanner) => scanner.for_each(text, visit),
            Engine::Regex(regex) => by_regex(regex, text, visit),
        }
    }

    /// A place at or after `from` where the text can be cut without changing its pieces.
    /// Only scanners know one; elsewhere it is the text's end.
    pub fn safe_cut(&self, text: &str, from: usize) -> usize {
        match self.engine {
            Engine::Scanner(_) => safe_cut(text, from),
            Engine::Regex(_) => text.len(),
        }
    }
}

/// What the pattern leaves out between two matches is a piece too, so that no pattern loses text.
/// The engine backtracks a bounded number of steps, and a careless pattern can need exponentially
/// many. There the text is cut after a fixed number of characters, so that every text has pieces.
fn by_regex(regex: &Regex, text: &str, mut visit: impl FnMut(usize, usize)) {
    let mut done = 0; // text[..done] has been visited
    let mut from = 0; // where the search goes on: after `done` where a match was empty
    let characters = |from: usize, n: usize| {
        let rest = &text[from..];
        from + rest.char_indices().nth(n).map_or(rest.len(), |(i, _)| i)
    };
    while from < text.len() {
        let (start, end) = match regex.find_from_pos(text, from) {
            Ok(Some(found)) => (found.start(), found.end()),
            Ok(None) => break,
            Err(_) => (done, characters(from, CHARS_AFTER_GIVING_UP)),
        };
        if start == end {
            from = characters(end, 1);
            continue;
        }
        if done < start {
            visit(done, start);
        }
        visit(start, end);
        (done, from) = (end, end);
    }
    if done < text.len() {
        visit(done, text.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PATTERN;
    use proptest::prelude::*;

    fn pieces<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        let splitter = Splitter::new(pattern).unwrap();
        splitter.for_each(text, |start, end| out.push(&text[start..end]));
        out
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
        fn pieces_join_to_the_text(text in any::<String>(), pattern in prop::sample::select(&[PATTERN, "a|[^a]{2}", "\\w*"])) {
            prop_assert_eq!(pieces(pattern, &text).concat(), text);
        }
    }
}
