//! `ext-proc-picker`: an endpoint picker that Envoy asks through `ext_proc`, made
//! of Dynamo's own crates. It does what Warmpath's filter does (chat template,
//! tokens, cached prefixes by the engines' events, load, bookings), so that the two
//! ways of doing it can be compared. It is meant to be as fast as this way gets:
//! its speed is what ours is measured against.
//!
//! | module | what |
//! |---|---|
//! | `prompt` | from a request's body to the prompt's tokens |
//! | `exchange` | one HTTP request, as Envoy tells of it |

mod exchange;
mod prompt;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use dynamo_kv_router::WorkerType;
use dynamo_kv_router::config::kv_router_config_from_dynamo_env;
use dynamo_kv_router::services::selection::{
    SelectionService, SelectionServiceBuilder, WorkerRequest,
};
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_server::ExternalProcessorServer;
use tonic::transport::Server;

use exchange::Picker;
use prompt::Prompts;

/// The tokenizers crate allocates much; this allocator is the fastest at hand.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Longest message from Envoy, in bytes: a body and its frame.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Windows of HTTP/2, in bytes: a long body needs no round trip.
const WINDOW_BYTES: u32 = 8 * 1024 * 1024;

/// What tokenizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Hugging Face's tokenizers, Dynamo's default.
    Hf,
    /// fastokens, Dynamo's `--tokenizer fastokens`.
    Fastokens,
}

#[derive(Debug, Parser)]
struct Arguments {
    /// Where Envoy connects to.
    #[arg(long)]
    listen: SocketAddr,
    /// Directory of the model: tokenizer.json, tokenizer_config.json.
    #[arg(long)]
    model_dir: PathBuf,
    /// Name of the model in requests.
    #[arg(long)]
    model_name: String,
    #[arg(long, value_enum)]
    tokenizer: Engine,
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    #[arg(long, default_value_t = 65_536)]
    total_kv_blocks: u64,
    /// A worker: HOST:PORT=URL of its KV events. May be repeated.
    #[arg(long)]
    worker: Vec<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let prompts = Prompts::load(&arguments.model_dir, arguments.tokenizer)?;
    let service = SelectionServiceBuilder::new(
        kv_router_config_from_dynamo_env(),
        WorkerType::Aggregated,
        dynamo_custom_policy_builtin::default_registry(),
    )
    .build()
    .await?;
    register(&service, &arguments).await?;
    let picker = Picker {
        prompts: Arc::new(prompts),
        service: Arc::new(service),
        model_name: arguments.model_name.as_str().into(),
    };
    Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .tcp_nodelay(true)
        .add_service(
            ExternalProcessorServer::new(picker)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
        .serve_with_shutdown(arguments.listen, async {
            // Ends also where there is no such signal.
            let _asked = tokio::signal::ctrl_c().await;
        })
        .await?;
    Ok(())
}

async fn register(service: &SelectionService, arguments: &Arguments) -> anyhow::Result<()> {
    for (number, worker) in (1..).zip(&arguments.worker) {
        let Some((endpoint, events)) = worker.split_once('=') else {
            bail!("--worker is HOST:PORT=URL");
        };
        let request = WorkerRequest {
            worker_id: number,
            model_name: arguments.model_name.clone(),
            endpoint: Some(endpoint.to_owned()),
            kv_events_endpoint: Some(events.to_owned()),
            block_size: Some(arguments.block_size),
            max_num_batched_tokens: Some(8_192),
            total_kv_blocks: Some(arguments.total_kv_blocks),
            ..WorkerRequest::default()
        };
        service.upsert_worker(request).await.with_context(|| format!("worker {number}"))?;
    }
    Ok(())
}
