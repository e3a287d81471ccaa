//! Tests of admission, accounting and the stream's position.

use std::path::Path;

use super::super::batch::Timing;
use super::super::cache::CacheKeys;
use super::super::publisher::PublisherConfig;
use super::*;

async fn engine(change: impl FnOnce(&mut EngineConfig)) -> Arc<Engine> {
    let mut config =
        EngineConfig { blocks: 16, block_size: 4, timing: Timing::NONE, ..EngineConfig::default() };
    change(&mut config);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let publisher = Publisher::start(PublisherConfig {
        events_port: 0,
        replay_port: 0,
        topic: String::new(),
        buffer_steps: 100,
        replay_has_topic: true,
    });
    let model = Model::load(&directory).unwrap();
    Arc::new(Engine::new(model, publisher.await.unwrap(), &config))
}

fn generation(tokens: usize, output_tokens: usize) -> Generation {
    let prompt = (0..).take(tokens).collect();
    Generation { prompt, output_tokens, keys: CacheKeys::default() }
}

/// Reads an answer to its end: cached tokens and words, if it was complete.
async fn read(mut pieces: mpsc::Receiver<Piece>) -> Option<(usize, Vec<Word>)> {
    let mut answer = (0, Vec::new());
    while let Some(piece) = pieces.recv().await {
        match piece {
            Piece::Started { cached_tokens } => answer.0 = cached_tokens,
            Piece::Words(words) => answer.1.extend(words),
            Piece::Finished => return Some(answer),
        }
    }
    None
}

/// Goal: a conversation's second turn finds prompt and answer of the first,
/// save the token that was never fed back.
#[tokio::test]
async fn answers_fill_blocks_too() {
    let engine = engine(|_| {}).await;
    let first = generation(10, 7);
    let (cached, words) = read(engine.start(first.clone()).unwrap()).await.unwrap();
    assert_eq!((cached, words.len()), (0, 7));
    // 10 + 7 - 1 computed tokens are four full blocks.
    assert_eq!(engine.position().blocks_cached, 4);

    let mut prompt = first.prompt;
    prompt.extend(words.iter().map(|word| word.token));
    prompt.extend([1, 2, 3]);
    let second = Generation { prompt, output_tokens: 1, keys: CacheKeys::default() };
    let (cached, _) = read(engine.start(second).unwrap()).await.unwrap();
    assert_eq!(cached, 16);
    let figures = engine.figures();
    assert_eq!((figures.prefix_queries, figures.prefix_hits), (30, 16));
    assert_eq!((figures.running, figures.waiting, figures.finished), (0, 0, 2));
}

/// Goal: when the end is visible, every event has its number.
#[tokio::test]
async fn the_position_is_final_at_the_end() {
    let engine = engine(|_| {}).await;
    read(engine.start(generation(8, 9)).unwrap()).await.unwrap();
    // One batch for the prompt's two blocks, two for the answer's.
    assert_eq!(engine.position().next_sequence, 3);
    assert_eq!(engine.position().blocks_used, 0);
}

/// Goal: a request that finds no room waits for it, and none is lost.
#[tokio::test]
async fn requests_wait_for_room() {
    let engine = engine(|config| config.blocks = 4).await;
    let answers: Vec<_> = (0..8).map(|_| engine.start(generation(9, 8)).unwrap()).collect();
    for answer in answers {
        assert!(read(answer).await.is_some());
    }
    assert_eq!(engine.figures().finished, 8);
    assert_eq!(engine.start(generation(9, 9)).unwrap_err(), RejectError::TooLong);
}

/// Goal: a client that leaves gives its blocks back, whether its request was
/// running or still waiting.
#[tokio::test]
async fn a_client_that_leaves_frees_its_blocks() {
    let engine = engine(|config| {
        config.blocks = 4;
        config.timing.step_us = 1_000;
    })
    .await;
    let mut running = engine.start(generation(8, 9)).unwrap();
    assert!(matches!(running.recv().await, Some(Piece::Started { .. })));
    let waiting = engine.start(generation(8, 9)).unwrap();
    drop(waiting);
    drop(running);
    let last = read(engine.start(generation(8, 9)).unwrap()).await;
    assert!(last.is_some());
    let figures = engine.figures();
    assert_eq!((figures.running, figures.waiting), (0, 0));
    assert_eq!((figures.aborted, figures.finished), (1, 1));
    assert_eq!(engine.position().blocks_used, 0);
}
