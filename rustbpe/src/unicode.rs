//! What the split patterns ask of a character: is it a letter, a number, white space, or none of these?

use crate::unicode_table::{PAGES, PAGE_OF, REST};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
}

impl Class {
    pub const fn of(code_point: u32) -> Self {
        let page = code_point as usize >> 8;
        let page = if page < PAGE_OF.len() {
            PAGE_OF[page]
        } else {
            REST
        };
        let four = PAGES[page as usize][code_point as usize >> 2 & 63];
        match four >> (code_point % 4 * 2) & 3 {
            0 => Self::Other,
            1 => Self::Letter,
            2 => Self::Number,
            _ => Self::Space,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;

    #[test]
    fn the_table_agrees_with_the_regex_engine_on_every_code_point() {
        let classes = [
            (Class::Letter, r"\p{L}"),
            (Class::Number, r"\p{N}"),
            (Class::Space, r"\s"),
        ];
        for (class, pattern) in classes {
            let regex = Regex::new(pattern).unwrap();
            for character in '\0'..=char::MAX {
                let in_class = regex.is_match(character.encode_utf8(&mut [0; 4])).unwrap();
                let table = Class::of(u32::from(character));
                assert_eq!(table == class, in_class, "{character:?} and {pattern}");
            }
        }
    }
}
