//! Our ids against those of HF's `tokenizers`, document by document.

use std::path::Path;
use std::time::{Duration, Instant};

use tokenizers::Tokenizer as Hf;
use warmpath_core::tokenize::{AlignedBytes, Tokenizer, compile};

/// Both tokenizers of one `tokenizer.json`.
pub struct Pair {
    name: String,
    ours: Tokenizer,
    hf: Hf,
}

/// What a comparison came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Documents compared.
    pub documents: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Documents whose ids differ, or that we refuse.
    pub differences: usize,
    ours: Duration,
    hf: Duration,
}

impl Tally {
    /// Adds another.
    #[allow(dead_code, reason = "used by one of the two tests that share this file")]
    pub fn add(&mut self, other: Self) {
        self.documents += other.documents;
        self.bytes += other.bytes;
        self.differences += other.differences;
        self.ours += other.ours;
        self.hf += other.hf;
    }

    /// One line for people.
    pub fn line(&self, name: &str) -> String {
        let speed = |time: Duration| self.bytes as f64 / time.as_secs_f64().max(1e-9) / 1e6;
        format!(
            "{name}: {} documents, {:.1} MB, {} differences; ours {:.1} MB/s, HF {:.1} MB/s",
            self.documents,
            self.bytes as f64 / 1e6,
            self.differences,
            speed(self.ours),
            speed(self.hf),
        )
    }
}

/// How many differing documents are shown of each comparison.
const SHOWN: usize = 3;

impl Pair {
    /// Compiles and loads one file.
    pub fn load(name: &str, path: &Path) -> Self {
        let json = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let start = Instant::now();
        let file = compile::compile(&json).unwrap_or_else(|e| panic!("{name}: {e}"));
        let compiled = start.elapsed();
        let bytes = AlignedBytes::from_slice(&file);
        let start = Instant::now();
        let ours = Tokenizer::load(bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let loaded = start.elapsed();
        let hf = Hf::from_bytes(&json).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!(
            "{name}: {:.1} MB compiled in {compiled:.1?}, loaded in {loaded:.1?}",
            file.len() as f64 / 1e6
        );
        Self { name: name.to_owned(), ours, hf }
    }

    /// Compares the ids of each document.
    pub fn compare<'a>(&mut self, documents: impl IntoIterator<Item = &'a str>) -> Tally {
        let mut tally = Tally::default();
        for document in documents {
            let start = Instant::now();
            let expected = self.hf.encode_fast(document, false).expect("HF encodes");
            tally.hf += start.elapsed();
            let mut ids = Vec::new();
            let start = Instant::now();
            let outcome = self.ours.encode(document, &mut ids);
            tally.ours += start.elapsed();
            tally.documents += 1;
            tally.bytes += document.len();
            if outcome.is_ok() && ids == expected.get_ids() {
                continue;
            }
            tally.differences += 1;
            if tally.differences <= SHOWN {
                self.show(document, outcome, &ids, expected.get_ids());
            }
        }
        tally
    }

    /// The contents of the added tokens.
    #[allow(dead_code, reason = "used by one of the two tests that share this file")]
    pub fn added_tokens(&self) -> Vec<String> {
        let mut contents: Vec<String> =
            self.hf.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        contents.sort();
        contents
    }

    fn show(
        &self,
        document: &str,
        outcome: Result<(), warmpath_core::tokenize::EncodeError>,
        ours: &[u32],
        hf: &[u32],
    ) {
        let at = ours.iter().zip(hf).take_while(|(a, b)| a == b).count();
        let window = |ids: &[u32]| ids[at.min(ids.len())..(at + 8).min(ids.len())].to_vec();
        let start: String = document.chars().take(80).collect();
        println!(
            "{}: {outcome:?} at token {at}: ours {:?}, HF {:?} in {} bytes: {start:?}",
            self.name,
            window(ours),
            window(hf),
            document.len()
        );
    }
}
