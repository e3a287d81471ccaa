//! Answer: how many blocks an answer fills as it comes.

/// The answer of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    prompt_tokens: u32,
    block_size: u32,
    tokens: u32,
    blocks: u32,
}

impl Answer {
    /// An answer that has not begun.
    ///
    /// - `block_size`: in tokens; of 0 no blocks are counted.
    #[must_use]
    pub fn new(prompt_tokens: u32, block_size: u32) -> Self {
        Self { prompt_tokens, block_size, tokens: 0, blocks: 0 }
    }

    /// More tokens have come. Returns the blocks that the answer fills beyond
    /// those of the prompt, a partial one counted, and its tokens, both in all, if
    /// there are more blocks than before (Dynamo: whenever `⌈(isl + osl) / bs⌉`
    /// grows).
    pub fn grow(&mut self, tokens: u64) -> Option<(u32, u32)> {
        self.tokens = self.tokens.saturating_add(u32::try_from(tokens).unwrap_or(u32::MAX));
        if self.block_size == 0 {
            return None;
        }
        let all = self.prompt_tokens.saturating_add(self.tokens).div_ceil(self.block_size);
        let blocks = all - self.prompt_tokens.div_ceil(self.block_size);
        let is_more = blocks > self.blocks;
        self.blocks = blocks.max(self.blocks);
        is_more.then_some((blocks, self.tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn blocks_grow_where_the_last_one_is_full() {
        // 30 tokens fill one block and all but two of the second.
        let mut answer = Answer::new(30, 16);
        assert_eq!(answer.grow(2), None);
        assert_eq!(answer.grow(0), None);
        assert_eq!(answer.grow(1), Some((1, 3)));
        assert_eq!(answer.grow(15), None);
        assert_eq!(answer.grow(40), Some((4, 58)), "several at once");
        assert_eq!(Answer::new(32, 16).grow(1), Some((1, 1)));
        assert_eq!(Answer::new(u32::MAX, 16).grow(u64::MAX), None);
        assert_eq!(Answer::new(30, 0).grow(99), None);
    }
}
