//! Scanners: the split patterns of nanochat, GPT-2 and GPT-4 written out by hand, because a regex
//! engine spends ten times as long on them.
//!
//! Each is tested against the regex engine on the pattern that it stands for.

use crate::unicode::Class;

/// GPT-4's split pattern, but with numbers cut into groups of at most two digits.
pub const PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
/// GPT-2's, as its vocabulary (`r50k_base`) is used today.
pub const GPT2_PATTERN: &str =
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// GPT-4's, as its vocabulary (`cl100k_base`) is used today: white space that ends a text is one piece.
pub const GPT4_PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s+";

/// The same patterns as tiktoken spells them.
const TIKTOKEN_GPT2: &str =
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";
const TIKTOKEN_GPT4: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";

/// The patterns that have a scanner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scanner {
    Nanochat,
    Gpt2,
    Gpt4,
}

impl Scanner {
    /// The scanner for a pattern, if it is spelled in a way that is known here.
    pub fn of(pattern: &str) -> Option<Self> {
        match pattern {
            PATTERN => Some(Self::Nanochat),
            GPT2_PATTERN | TIKTOKEN_GPT2 => Some(Self::Gpt2),
            GPT4_PATTERN | TIKTOKEN_GPT4 => Some(Self::Gpt4),
            _ => None,
        }
    }

    /// Calls `visit` with the start and the end of every piece, in order.
    #[inline(always)]
    pub fn for_each(self, text: &str, visit: impl FnMut(usize, usize)) {
        match self {
            Self::Nanochat => scan::<Gpt4<2, false>>(text, visit),
            Self::Gpt2 => scan::<Gpt2>(text, visit),
            Self::Gpt4 => scan::<Gpt4<3, true>>(text, visit),
        }
    }
}

/// What a pattern says.
trait Rules {
    /// The end of the piece that begins at `start`, which is before the end of the text.
    fn piece_end(text: &[u8], start: usize) -> usize;
}

#[inline(always)]
fn scan<R: Rules>(text: &str, mut visit: impl FnMut(usize, usize)) {
    let text = text.as_bytes();
    let mut start = 0;
    while start < text.len() {
        let end = R::piece_end(text, start);
        visit(start, end);
        start = end;
    }
}

/// GPT-4's pattern, or nanochat's, which allows two digits instead of three and knows no special
/// case for the end of the text.
struct Gpt4<const DIGITS: usize, const END_IS_ONE_PIECE: bool>;

impl<const DIGITS: usize, const END_IS_ONE_PIECE: bool> Rules for Gpt4<DIGITS, END_IS_ONE_PIECE> {
    #[inline(always)]
    fn piece_end(t: &[u8], start: usize) -> usize {
        if let [b' ', second, ..] = &t[start..] {
            if second.is_ascii_alphabetic() {
                return letters_end(t, start + 2); // most pieces are words
            }
        }
        let (class, after) = class_at(t, start);
        match class {
            LETTER => return letters_end(t, after),
            NUMBER => {
                let mut end = after;
                for _ in 1..DIGITS {
                    match class_at(t, end) {
                        (NUMBER, next) => end = next,
                        _ => break,
                    }
                }
                return end;
            }
            _ => {}
        }
        if t[start] == b'\'' {
            if let Some(end) = contraction_end(t, after, true) {
                return end;
            }
        }
        let newline = matches!(t[start], b'\r' | b'\n');
        let (second, after_second) = class_at(t, after);
        // any one character that is no letter, no number and no line break may begin a word
        if second == LETTER && !newline {
            return letters_end(t, after_second);
        }
        if class == OTHER || (t[start] == b' ' && second == OTHER) {
            let mut end = others_end(t, if class == OTHER { after } else { after_second });
            while matches!(t.get(end), Some(b'\r' | b'\n')) {
                end += 1;
            }
            return end;
        }
        let space = Spaces::measure(t, start);
        if END_IS_ONE_PIECE && space.end == t.len() {
            space.end
        } else {
            space.newline_end.unwrap_or_else(|| space.without_last(t))
        }
    }
}

/// GPT-2's pattern.
struct Gpt2;

impl Rules for Gpt2 {
    #[inline(always)]
    fn piece_end(t: &[u8], start: usize) -> usize {
        if t[start] == b'\'' {
            if let Some(end) = contraction_end(t, start + 1, false) {
                return end;
            }
        }
        let (mut class, mut after) = class_at(t, start);
        if t[start] == b' ' {
            match class_at(t, after) {
                (END | SPACE, _) => {}
                second => (class, after) = second,
            }
        }
        match class {
            LETTER => letters_end(t, after),
            NUMBER => run_end(t, after, NUMBER),
            OTHER => others_end(t, after),
            _ => Spaces::measure(t, start).without_last(t),
        }
    }
}

// Classes as numbers, so that a table can hold them.
const OTHER: u8 = Class::Other as u8;
const LETTER: u8 = Class::Letter as u8;
const NUMBER: u8 = Class::Number as u8;
const SPACE: u8 = Class::Space as u8;
/// Behind the text.
const END: u8 = 4;

const ASCII: [u8; 128] = {
    let mut table = [0; 128];
    let mut b = 0;
    while b < 128 {
        table[b] = Class::of(b as u32) as u8;
        b += 1;
    }
    table
};

/// The class of the character at `i`, and where the next one begins.
#[inline(always)]
fn class_at(t: &[u8], i: usize) -> (u8, usize) {
    match t.get(i) {
        None => (END, i),
        Some(&b) if b < 128 => (ASCII[b as usize], i + 1),
        Some(_) => class_beyond_ascii(t, i),
    }
}

/// The same for a character of two to four bytes. The text is valid UTF-8.
#[inline(never)]
fn class_beyond_ascii(t: &[u8], i: usize) -> (u8, usize) {
    let tail = |k: usize| u32::from(t[i + k] & 0x3F);
    let first = u32::from(t[i]);
    let (code_point, length) = match first {
        0xF0.. => (
            (first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3),
            4,
        ),
        0xE0.. => ((first & 0x0F) << 12 | tail(1) << 6 | tail(2), 3),
        _ => ((first & 0x1F) << 6 | tail(1), 2),
    };
    (Class::of(code_point) as u8, i + length)
}

fn run_end(t: &[u8], mut i: usize, class: u8) -> usize {
    loop {
        match class_at(t, i) {
            (found, next) if found == class => i = next,
            _ => return i,
        }
    }
}

fn others_end(t: &[u8], i: usize) -> usize {
    run_end(t, i, OTHER)
}

/// Where the letters that go on at `i` end. ASCII letters are looked at eight at a time.
#[inline(always)]
fn letters_end(t: &[u8], mut i: usize) -> usize {
    while let Some(chunk) = t.get(i..).and_then(|rest| rest.first_chunk::<8>()) {
        let others = !ascii_letters(u64::from_le_bytes(*chunk)) & HIGH_BITS;
        if others == 0 {
            i += 8;
            continue;
        }
        i += others.trailing_zeros() as usize / 8;
        if t[i] < 128 {
            return i;
        }
        match class_beyond_ascii(t, i) {
            (LETTER, next) => i = next,
            _ => return i,
        }
    }
    run_end(t, i, LETTER)
}

const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// The high bit of every byte that is an ASCII letter; the other bits mean nothing.
#[inline(always)]
fn ascii_letters(bytes: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // seven bits each, so that no sum carries into the next byte
    let lower = (bytes | (0x20 * ONES)) & !HIGH_BITS;
    let from_a = lower + (0x80 - b'a' as u64) * ONES;
    let past_z = lower + (0x80 - (b'z' as u64 + 1)) * ONES;
    from_a & !past_z & !bytes
}

/// Where a contraction ends whose apostrophe is before `i`, if there is one: 's 'd 'm 't 'll 've 're.
fn contraction_end(t: &[u8], i: usize, any_case: bool) -> Option<usize> {
    let lower = |k: usize| {
        let b = *t.get(k)?;
        Some(if any_case { b.to_ascii_lowercase() } else { b })
    };
    match (lower(i)?, lower(i + 1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(i + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(i + 2),
        // the long s (U+017F) is an s in another case
        (0xC5, Some(0xBF)) if any_case => Some(i + 2),
        _ => None,
    }
}

/// A run of white space.
struct Spaces {
    start: usize,
    end: usize,
    /// where the last character begins
    last: usize,
    /// behind the last line break, if there is one
    newline_end: Option<usize>,
}

impl Spaces {
    #[inline(always)]
    fn measure(t: &[u8], start: usize) -> Self {
        let (mut end, mut last, mut newline_end) = (start, start, None);
        while let (SPACE, next) = class_at(t, end) {
            (last, end) = (end, next);
            if matches!(t[last], b'\r' | b'\n') {
                newline_end = Some(end);
            }
        }
        Self {
            start,
            end,
            last,
            newline_end,
        }
    }

    /// The run's end; but the last of several characters is left to the word that follows.
    #[inline(always)]
    fn without_last(&self, t: &[u8]) -> usize {
        if self.end == t.len() || self.last == self.start {
            self.end
        } else {
            self.last
        }
    }
}

/// A place at or after `from` where the text can be cut without changing its pieces by any of the
/// scanners: between an ASCII letter and a single space before another. The text's end if there
/// is none.
pub fn safe_cut(text: &str, from: usize) -> usize {
    let t = text.as_bytes();
    let letter = |b: u8| b.is_ascii_alphabetic();
    t.get(from..)
        .unwrap_or_default()
        .windows(3)
        .position(|w| letter(w[0]) && w[1] == b' ' && letter(w[2]))
        .map_or(t.len(), |i| from + i + 1)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::split::Splitter;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    const ALL: [&str; 5] = [
        PATTERN,
        GPT2_PATTERN,
        GPT4_PATTERN,
        TIKTOKEN_GPT2,
        TIKTOKEN_GPT4,
    ];

    fn by_scanner<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        let scanner = Scanner::of(pattern).unwrap();
        scanner.for_each(text, |start, end| pieces.push(&text[start..end]));
        pieces
    }

    /// The group is the same pattern, spelled in a way for which there is no scanner.
    static REGEXES: LazyLock<[Splitter; 5]> = LazyLock::new(|| {
        ALL.map(|pattern| {
            let splitter = Splitter::new(&format!("(?:{pattern})")).unwrap();
            assert!(!splitter.is_scanner());
            splitter
        })
    });

    fn by_regex<'t>(regex: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        regex.for_each(text, |start, end| pieces.push(&text[start..end]));
        pieces
    }

    /// Texts in which the patterns' corner cases are frequent, and then anything at all.
    pub fn texts() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            4 => "[ \t\r\n]{1,4}",
            4 => "[a-zA-Z]{1,12}",
            2 => "[0-9]{1,7}",
            2 => "[!-/:-@'`{-~]{1,4}",
            2 => "'(s|S|ſ|t|ll|Ll|vE|re|RE|d|m|x|l|v)",
            2 => "[éßжд中文字ぁ한ǅªʰ]{1,4}",
            1 => "[\u{300}-\u{36F}\u{200D}\u{FE0F}]{1,3}",
            1 => "[٣५²½Ⅷ①]{1,4}",
            1 => "[\u{85}\u{A0}\u{1680}\u{2000}-\u{200B}\u{2028}\u{2029}\u{202F}\u{3000}\u{FEFF}\u{1C}]{1,3}",
            1 => "[🐈👩👨🏽😀]{1,3}",
            1 => "\\PC{1,4}",
            1 => any::<String>(),
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    #[test]
    fn words_numbers_and_space() {
        assert_eq!(
            by_scanner(PATTERN, "It's 2026,  she'LL wait!\n\n ok "),
            ["It", "'s", " ", "20", "26", ",", " ", " she", "'LL", " wait", "!\n\n", " ok", " "]
        );
        assert_eq!(
            by_scanner(PATTERN, "a \n \n  b \n "),
            ["a", " \n \n", " ", " b", " \n", " "]
        );
        assert_eq!(
            by_scanner(GPT4_PATTERN, "1234a \n "),
            ["123", "4", "a", " \n "]
        );
        assert_eq!(
            by_scanner(GPT2_PATTERN, "It'S 1234\n\n ok"),
            ["It", "'", "S", " 1234", "\n\n", " ok"]
        );
        assert!(by_scanner(PATTERN, "").is_empty());
    }

    #[test]
    fn every_code_point_between_letters_digits_and_space() {
        for (pattern, regex) in ALL.iter().zip(REGEXES.iter()) {
            let scanner = Scanner::of(pattern).unwrap();
            for block in (0..0x110000u32).step_by(64) {
                let text: String = (block..block + 64)
                    .filter_map(char::from_u32)
                    .flat_map(|c| ['a', c, '1', c, ' ', c, c, '\n', c, '\'', c, 'b'])
                    .collect();
                let (mut one, mut other) = (Vec::new(), Vec::new());
                scanner.for_each(&text, |_, end| one.push(end));
                regex.for_each(&text, |_, end| other.push(end));
                assert_eq!(one, other, "{pattern} at U+{block:04X}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn scanners_agree_with_the_regex_engine(text in texts()) {
            for (pattern, regex) in ALL.iter().zip(REGEXES.iter()) {
                prop_assert_eq!(by_scanner(pattern, &text), by_regex(regex, &text), "{}", pattern);
            }
        }

        #[test]
        fn a_safe_cut_changes_no_piece(text in "([a-c]{1,3}| |\n|'s|[0-9!]){0,30}", from in 0usize..40) {
            let cut = safe_cut(&text, from);
            for pattern in ALL {
                let mut parts = by_scanner(pattern, &text[..cut]);
                parts.extend(by_scanner(pattern, &text[cut..]));
                prop_assert_eq!(parts, by_scanner(pattern, &text), "{}", pattern);
            }
        }
    }
}
