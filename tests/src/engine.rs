//! Engine simulator: an OpenAI-compatible server with a paged prefix cache.
//!
//! It stands where vLLM stands: it tokenizes, keeps a cache of full blocks,
//! announces every change of it over ZMQ and says in `usage` how many prompt
//! tokens came from the cache. Nothing of `warmpath-core` is used here, so that
//! agreement between the filter's prediction and the engine's report means
//! something: tokens come from Hugging Face's own crate, the template is
//! rendered by a set-up of its own, blocks are named by SHA-256.
//!
//! What it does not have: a model. Prefill and decode take configured time,
//! and the tokens generated follow from the prompt alone.
//!
//! | module | what |
//! |---|---|
//! | `cache` | blocks, hits, eviction; pure |
//! | `events` | cache changes as msgpack, in the engines' forms; pure |
//! | `config` | flags of the binary |
//! | `model` | tokenizer and chat template from a model directory |
//! | `publisher` | ZMQ PUB and replay ROUTER, with fault switches |
//! | `batch` | continuous batching: steps, what is in them, how long they take; pure |
//! | `segments` | tokens of texts that come again |
//! | `scheduler` | drives the batch in real time; load figures |
//! | `openai` | request and response shapes |
//! | `http` | the server |
//! | `metrics` | `/metrics` with vLLM's names |

mod apis;
pub mod batch;
pub mod cache;
pub mod config;
pub mod events;
pub mod http;
pub mod limits;
pub mod metrics;
pub mod model;
pub mod openai;
pub mod publisher;
pub mod scheduler;
pub mod segments;
