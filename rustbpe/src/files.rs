//! What is kept on disk: `tokenizer.json` as Hugging Face's tokenizers read it, and tiktoken's rank files.
//!
//! What is read is believed in nothing: the vocabulary is made anew from the tokens, and the file
//! must be what this vocabulary would be written as. So no field can quietly mean something else
//! here than elsewhere.

use std::fmt;

use base64::engine::general_purpose::STANDARD as BASE64;
use base64::Engine;
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Splitter, Vocab, MAX_VOCAB_SIZE};

/// The content of `tokenizer.json`.
pub fn to_json(vocab: &Vocab, pattern: &str) -> String {
    let file = TokenizerJson::new(vocab, pattern);
    serde_json::to_string_pretty(&file).expect("strings and numbers are JSON")
}

/// The vocabulary and the splitter that a `tokenizer.json` describes.
pub fn from_json(data: &[u8]) -> Result<(Vocab, Splitter), Error> {
    let refuse = |why: &str| Err(Error::File(why.to_owned()));
    let mut file: TokenizerJson =
        serde_json::from_slice(data).map_err(|e| Error::File(e.to_string()))?;
    file.model.vocab.0.sort_unstable_by_key(|&(_, id)| id);
    let byte_of = byte_of_char();
    let mut tokens: Vec<Vec<u8>> = Vec::with_capacity(file.model.vocab.0.len());
    for (name, id) in &file.model.vocab.0 {
        let bytes = name
            .chars()
            .map(|c| byte_of.get(c as usize).copied().flatten());
        let Some(token) = bytes.collect::<Option<Vec<u8>>>() else {
            return refuse(&format!(
                "token {id} of its vocabulary is not spelled in the byte alphabet"
            ));
        };
        if *id as usize != tokens.len() {
            return refuse("the ids of its vocabulary do not count from 0 without gaps");
        }
        tokens.push(token);
    }
    let special: Vec<&str> = file.added_tokens.iter().map(|t| &*t.content).collect();
    let vocab = Vocab::new(&tokens, &special)?;
    let [PreTokenizer::Split { pattern, .. }, _] = &file.pre_tokenizer.pretokenizers else {
        return refuse("its pre-tokenizer has no split pattern");
    };
    let splitter = Splitter::new(&pattern.regex)?;
    if TokenizerJson::new(&vocab, &pattern.regex) != file {
        return refuse("its merges, special tokens or settings are not those of its vocabulary");
    }
    Ok((vocab, splitter))
}

/// The content of a rank file: a line for each token, its bytes in base64 and its rank.
/// Special tokens are not part of it.
pub fn to_ranks(vocab: &Vocab) -> String {
    let line = |id| format!("{} {id}\n", BASE64.encode(vocab.token(id)));
    (0..vocab.n_tokens() as u32).map(line).collect()
}

/// The vocabulary of a rank file, with special tokens behind it.
pub fn from_ranks<S: AsRef<str>>(data: &[u8], special: &[S]) -> Result<Vocab, Error> {
    let mut ranked: Vec<(u32, Vec<u8>)> = Vec::new();
    for (i, line) in data.split(|&b| b == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        if ranked.len() == MAX_VOCAB_SIZE {
            return Err(Error::VocabSize(ranked.len() + 1));
        }
        let parse = || {
            let space = line.iter().position(|&b| b == b' ')?;
            let token = BASE64.decode(&line[..space]).ok()?;
            let rank = std::str::from_utf8(&line[space + 1..]).ok()?.parse().ok()?;
            Some((rank, token))
        };
        let Some(entry) = parse() else {
            let why = format!(
                "line {} is not a token in base64, a space and a rank",
                i + 1
            );
            return Err(Error::File(why));
        };
        ranked.push(entry);
    }
    ranked.sort_unstable();
    if let Some(k) = (0..ranked.len()).find(|&k| ranked[k].0 as usize != k) {
        let why = format!(
            "its ranks do not count from 0 without gaps: rank {k} is missing or twice there"
        );
        return Err(Error::File(why));
    }
    let tokens: Vec<Vec<u8>> = ranked.into_iter().map(|(_, token)| token).collect();
    Vocab::new(&tokens, special)
}

/// The character that stands for each byte in `tokenizer.json`: JSON holds text, and half of a
/// character is no text. As in GPT-2 it is the byte's own if it can be seen, otherwise one from
/// U+0100 on.
pub fn byte_alphabet() -> [char; 256] {
    let mut others = (0x100..0x200).filter_map(char::from_u32);
    std::array::from_fn(|byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte as u8),
        _ => others.next().unwrap_or(char::REPLACEMENT_CHARACTER),
    })
}

fn byte_of_char() -> [Option<u8>; 0x200] {
    let mut table = [None; 0x200];
    for (byte, c) in byte_alphabet().into_iter().enumerate() {
        table[c as usize] = Some(byte as u8);
    }
    table
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct TokenizerJson {
    version: String,
    truncation: (),
    padding: (),
    added_tokens: Vec<AddedToken>,
    normalizer: (),
    pre_tokenizer: PreTokenizers,
    post_processor: (),
    decoder: PreTokenizer,
    model: Model,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct AddedToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct PreTokenizers {
    r#type: String,
    pretokenizers: [PreTokenizer; 2],
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(tag = "type", deny_unknown_fields)]
enum PreTokenizer {
    Split {
        pattern: Pattern,
        behavior: String,
        invert: bool,
    },
    ByteLevel {
        add_prefix_space: bool,
        trim_offsets: bool,
        use_regex: bool,
    },
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Pattern {
    #[serde(rename = "Regex")]
    regex: String,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Model {
    r#type: String,
    dropout: (),
    unk_token: (),
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Names,
    merges: Vec<[String; 2]>,
}

/// A JSON object from name to id that keeps its order, and what is in it twice.
#[derive(PartialEq)]
struct Names(Vec<(String, u32)>);

impl TokenizerJson {
    fn new(vocab: &Vocab, pattern: &str) -> Self {
        let alphabet = byte_alphabet();
        let name = |id: u32| -> String {
            let token = vocab.token(id).iter();
            token.map(|&b| alphabet[b as usize]).collect()
        };
        let byte_level = || PreTokenizer::ByteLevel {
            add_prefix_space: false,
            trim_offsets: true,
            use_regex: false,
        };
        let n_tokens = vocab.n_tokens() as u32;
        let added = |(k, content)| AddedToken {
            id: n_tokens + k as u32,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        };
        let merges = vocab.merges().iter().flatten();
        let n_merges = merges.clone().count();
        Self {
            version: "1.0".into(),
            truncation: (),
            padding: (),
            added_tokens: vocab.special_tokens().enumerate().map(added).collect(),
            normalizer: (),
            pre_tokenizer: PreTokenizers {
                r#type: "Sequence".into(),
                pretokenizers: [
                    PreTokenizer::Split {
                        pattern: Pattern {
                            regex: pattern.into(),
                        },
                        behavior: "Isolated".into(),
                        invert: false,
                    },
                    byte_level(),
                ],
            },
            post_processor: (),
            decoder: byte_level(),
            model: Model {
                r#type: "BPE".into(),
                dropout: (),
                unk_token: (),
                continuing_subword_prefix: (),
                end_of_word_suffix: (),
                fuse_unk: false,
                byte_fallback: false,
                // a piece that is a token is that token, also where no merges make it
                ignore_merges: n_merges + 256 < vocab.n_tokens(),
                vocab: Names((0..n_tokens).map(|id| (name(id), id)).collect()),
                merges: merges
                    .map(|&(left, right)| [name(left), name(right)])
                    .collect(),
            },
        }
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, id) in &self.0 {
            map.serialize_entry(name, id)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Names;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tokens and ids")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    names.push(entry);
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GPT2_PATTERN, PATTERN};
    use proptest::prelude::*;

    const SPECIAL: [&str; 2] = ["<|bos|>", "<|end|>"];

    fn small() -> Vocab {
        Vocab::from_merges(&[(104, 105), (32, 256), (195, 169)], &SPECIAL).unwrap()
    }

    fn all(vocab: &Vocab) -> (Vec<Vec<u8>>, Vec<Option<crate::Pair>>) {
        let tokens = (0..vocab.size() as u32).map(|id| vocab.token(id).to_vec());
        (tokens.collect(), vocab.merges().to_vec())
    }

    #[test]
    fn the_alphabet_is_gpt2s() {
        let alphabet = byte_alphabet();
        let text: String = " né\n".bytes().map(|b| alphabet[b as usize]).collect();
        assert_eq!(text, "ĠnÃ©Ċ");
        let distinct: std::collections::HashSet<_> = alphabet.into_iter().collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn what_is_written_is_read() {
        let json = to_json(&small(), PATTERN);
        let (vocab, splitter) = from_json(json.as_bytes()).unwrap();
        assert_eq!(all(&vocab), all(&small()));
        assert_eq!(splitter.pattern(), PATTERN);
        let ranks = to_ranks(&small());
        assert!(ranks.contains("aGk= 256\n"));
        let vocab = from_ranks(ranks.as_bytes(), &SPECIAL).unwrap();
        assert_eq!(all(&vocab), all(&small()));
    }

    #[test]
    fn bytes_in_another_order_and_tokens_without_merges() {
        let mut tokens: Vec<Vec<u8>> = (0..=255).rev().map(|b| vec![b]).collect();
        tokens.insert(7, b"abc".to_vec());
        let vocab = Vocab::new(&tokens, &SPECIAL).unwrap();
        let json = to_json(&vocab, GPT2_PATTERN);
        assert!(json.contains("\"ignore_merges\": true"));
        assert_eq!(all(&from_json(json.as_bytes()).unwrap().0), all(&vocab));
        let again = from_ranks(to_ranks(&vocab).as_bytes(), &SPECIAL).unwrap();
        assert_eq!(all(&again), all(&vocab));
    }

    #[test]
    fn changed_files_are_refused() {
        let json = to_json(&small(), PATTERN);
        let refused = |from: &str, to: &str| {
            assert!(json.contains(from), "{from}");
            assert!(
                from_json(json.replacen(from, to, 1).as_bytes()).is_err(),
                "{from} -> {to}"
            );
        };
        refused("\"version\": \"1.0\"", "\"version\": \"2.0\"");
        refused(
            "\"normalizer\": null",
            "\"normalizer\": {\"type\": \"Lowercase\"}",
        );
        refused(
            "\"truncation\": null,",
            "\"truncation\": null, \"more\": 1,",
        );
        refused("\"special\": true", "\"special\": false");
        refused("\"id\": 259", "\"id\": 260");
        refused("\"content\": \"<|bos|>\"", "\"content\": \"<|end|>\"");
        refused("\"hi\": 256", "\"ho\": 256");
        refused("\"hi\": 256", "\"hi\": 4000000000");
        refused("\"hi\": 256", "\"hi\": -1");
        refused("\"hi\": 256", "\"hi\": 256, \"hi\": 256");
        refused("\"hi\": 256", "\"h中\": 256");
        refused("\"ignore_merges\": false", "\"ignore_merges\": true");
        refused("\"h\",\n        \"i\"", "\"i\",\n        \"h\"");
        refused("\"behavior\": \"Isolated\"", "\"behavior\": \"Removed\"");
        refused("(?i:", "(?i:(");
        for junk in [
            "",
            "null",
            "[]",
            "7",
            "{\"model\": 3}",
            &"[".repeat(100_000),
        ] {
            assert!(matches!(from_json(junk.as_bytes()), Err(Error::File(_))));
        }
    }

    #[test]
    fn bad_rank_files_are_refused() {
        let good = to_ranks(&small());
        let refused = |data: &[u8]| assert!(from_ranks(data, &SPECIAL).is_err());
        refused(b"");
        refused(b"aGk= 0\n");
        refused(&good.as_bytes()[..good.len() / 2]);
        refused(format!("{good}!! 259\n").as_bytes());
        refused(format!("{good}aGkh\n").as_bytes());
        refused(format!("{good}aGkh -1\n").as_bytes());
        refused(format!("{good}aGkh 260\n").as_bytes());
        refused(format!("{good}aGkh 258\n").as_bytes());
        refused(format!("{good}aGk= 259\n").as_bytes());
        refused(format!("{good} 259\n").as_bytes());
        assert!(from_ranks(good.replace('\n', "\r\n").as_bytes(), &SPECIAL).is_ok());
    }

    proptest! {
        /// Whatever an injured file is taken for, it is written and read again as the same.
        #[test]
        fn injuries_never_panic(injuries in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5), json in any::<bool>()) {
            let mut data = if json { to_json(&small(), PATTERN) } else { to_ranks(&small()) }.into_bytes();
            for (at, byte) in injuries {
                let at = at.index(data.len());
                data[at] = byte;
            }
            if json {
                if let Ok((vocab, splitter)) = from_json(&data) {
                    let again = from_json(to_json(&vocab, splitter.pattern()).as_bytes()).unwrap();
                    prop_assert_eq!(all(&again.0), all(&vocab));
                }
            } else if let Ok(vocab) = from_ranks(&data, &SPECIAL) {
                let again = from_ranks(to_ranks(&vocab).as_bytes(), &SPECIAL).unwrap();
                prop_assert_eq!(all(&again), all(&vocab));
            }
        }
    }
}
