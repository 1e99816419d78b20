//! Writes `src/unicode_table.rs`: `cargo run --release --example unicode_table > src/unicode_table.rs`.
//!
//! The regex engine is asked for the class of every code point, two bits each. Pages of 256 code
//! points that are equal are stored once.

use fancy_regex::Regex;

fn main() {
    let classes = [r"\p{L}", r"\p{N}", r"\s"].map(|class| Regex::new(class).unwrap());
    let class = |point: u32| {
        let Some(character) = char::from_u32(point) else {
            return 0;
        };
        let text = character.to_string();
        let found = classes.iter().position(|c| c.is_match(&text).unwrap());
        found.map_or(0, |class| class as u8 + 1)
    };
    let mut pages: Vec<[u8; 64]> = Vec::new();
    let mut page_of: Vec<usize> = Vec::new();
    for start in (0..0x110000).step_by(256) {
        let mut page = [0; 64];
        for offset in 0..256 {
            page[offset / 4] |= class(start + offset as u32) << (offset % 4 * 2);
        }
        let known = pages.iter().position(|p| *p == page);
        page_of.push(known.unwrap_or_else(|| {
            pages.push(page);
            pages.len() - 1
        }));
    }
    // everything above this page is alike: unassigned or private
    let last = page_of.iter().rposition(|p| *p != page_of[0x10FF]).unwrap();
    let rest = page_of[0x10FF];
    page_of.truncate(last + 1);
    println!("//! Written by `examples/unicode_table.rs`: not to be edited.");
    println!();
    println!("/// The page of each 256 code points.");
    println!("#[rustfmt::skip]");
    println!("pub const PAGE_OF: [u8; {}] = [", page_of.len());
    for row in page_of.chunks(32) {
        let row: Vec<String> = row.iter().map(|p| p.to_string()).collect();
        println!("    {},", row.join(", "));
    }
    println!("];");
    println!();
    println!("/// The page of all code points above those.");
    println!("pub const REST: u8 = {rest};");
    println!();
    println!("/// Two bits a code point, the first in the lowest bits.");
    println!("#[rustfmt::skip]");
    println!("pub const PAGES: [[u8; 64]; {}] = [", pages.len());
    for page in &pages {
        let row: Vec<String> = page.iter().map(|b| b.to_string()).collect();
        println!("    [{}],", row.join(", "));
    }
    println!("];");
}
