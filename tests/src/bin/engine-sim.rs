//! `engine-sim`: one simulated engine on 127.0.0.1.
//!
//! Prints one JSON line with its ports once it serves, then runs until SIGTERM
//! or Ctrl-C.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use axum::serve::ListenerExt;
use tokio::signal::unix::{SignalKind, signal};
use warmpath_tests::engine::config::{ConfigError, EngineConfig};
use warmpath_tests::engine::events::EventForm;
use warmpath_tests::engine::http::router;
use warmpath_tests::engine::model::Model;
use warmpath_tests::engine::publisher::{Publisher, PublisherConfig};
use warmpath_tests::engine::scheduler::Engine;

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let config = match EngineConfig::parse(std::env::args().skip(1)) {
        Ok(config) => config,
        Err(ConfigError::Help) => {
            let _shown = write!(std::io::stdout(), "{}", ConfigError::Help);
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    match serve(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref()),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    // Nowhere left to say it if standard error is closed.
    let _shown = writeln!(std::io::stderr(), "engine-sim: {error}");
    ExitCode::FAILURE
}

async fn serve(config: EngineConfig) -> Result<(), Box<dyn std::error::Error>> {
    let model = Model::load(&config.model_dir)?;
    let publisher = Publisher::start(PublisherConfig {
        events_port: config.events_port,
        replay_port: config.replay_port,
        topic: config.events_topic.clone(),
        buffer_steps: config.buffer_steps,
        replay_has_topic: config.events_form != EventForm::Sglang,
    })
    .await?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", config.port)).await?;
    let ready = serde_json::json!({
        "name": config.name,
        "port": listener.local_addr()?.port(),
        "events_port": publisher.events_port,
        "replay_port": publisher.replay_port,
    });
    let engine = Arc::new(Engine::new(model, publisher, &config));
    let mut terminate = signal(SignalKind::terminate())?;
    writeln!(std::io::stdout(), "{ready}")?;
    // A token must not wait for the acknowledgement of the one before.
    let listener = listener.tap_io(|connection| {
        // If it cannot be set, tokens come a little later.
        let _set = connection.set_nodelay(true);
    });
    let server = axum::serve(listener, router(engine, config));
    // Streams in flight are cut, as when a real engine is stopped hard.
    tokio::select! {
        served = server.into_future() => served?,
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}
