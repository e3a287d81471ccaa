//! Contexts: the SDK's callbacks, handed on to `vm` and `http`.

use core::cell::RefCell;
use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};

use crate::config::Config;
#[cfg(feature = "test-hooks")]
use crate::hooks;
use crate::host;
use crate::http::{Next, Stream};
use crate::limits::TICK_MS;
use crate::pairing;
use crate::reading;
use crate::vm;

#[cfg(target_arch = "wasm32")]
proxy_wasm::main! {{
    // Every level is passed on: the gateway filters.
    if log::set_logger(&host::HostLog).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
    proxy_wasm::set_root_context(|context| -> Box<dyn RootContext> {
        Box::new(Root {
            context,
            config: None,
            #[cfg(feature = "test-hooks")]
            reads: None,
        })
    });
}}

/// The root context: configuration, ticks, streams.
struct Root {
    context: u32,
    config: Option<Rc<Config>>,
    /// Serves what tests want to see instead of routing.
    #[cfg(feature = "test-hooks")]
    reads: Option<hooks::Reads>,
}

impl Root {
    /// Whether this context drives the feed: after a reconfiguration the old
    /// one may tick on for minutes.
    fn drives(&self) -> bool {
        vm::with(|vm| vm.root == self.context).unwrap_or(false)
    }
}

impl Context for Root {
    fn on_grpc_stream_message(&mut self, token_id: u32, message_size: usize) {
        #[cfg(feature = "test-hooks")]
        let _watch = hooks::Watch::start(hooks::Callback::Message);
        if self.drives() {
            let now_ms = host::monotonic_ns() / 1_000_000;
            vm::with(|vm| vm.on_message(token_id, message_size, now_ms));
        } else {
            host::reset_stream(token_id);
        }
    }

    fn on_done(&mut self) -> bool {
        vm::with(|vm| vm.metrics.tell());
        true
    }

    fn on_grpc_stream_close(&mut self, token_id: u32, status_code: u32) {
        if self.drives() {
            vm::with(|vm| vm.on_stream_end(token_id, status_code));
        } else {
            host::close_stream(token_id);
        }
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, size: usize) -> bool {
        let json = host::buffer(host::Buffer::PluginConfiguration, 0, size).unwrap_or_default();
        #[cfg(feature = "test-hooks")]
        if let Some(reads) = hooks::Reads::of(&json) {
            self.reads = Some(reads);
            return true;
        }
        let config = match Config::parse(&json) {
            Ok(config) => config,
            Err(err) => {
                log::error!("warmpath: {err}");
                return false;
            }
        };
        if vm::configure(&config, self.context).is_err() {
            log::error!("warmpath: the gateway's shared data cannot be used");
            return false;
        }
        if host::set_tick_period(TICK_MS).is_err() {
            log::error!("warmpath: the gateway gives no ticks");
            return false;
        }
        log::info!(
            "warmpath {}: mode {:?}, feed cluster {}",
            env!("CARGO_PKG_VERSION"),
            config.mode,
            config.feed_cluster
        );
        self.config = Some(Rc::new(config));
        true
    }

    fn on_tick(&mut self) {
        if !self.drives() {
            return;
        }
        #[cfg(feature = "test-hooks")]
        let _watch = hooks::Watch::start(hooks::Callback::Tick);
        let now_ms = host::monotonic_ns() / 1_000_000;
        vm::with(|vm| {
            // Before the gauges: who sees that nothing is booked any more sees the
            // counts of it as well.
            vm.metrics.tell();
            let is_left = vm.tick(now_ms);
            vm.drive_feed(now_ms);
            let is_busy = is_left || vm.feed_is_busy();
            vm.pace.ticked(is_busy, vm.readings.len() > 0);
        });
        pairing::release_stuck(now_ms);
        reading::tick(now_ms);
    }

    fn on_queue_ready(&mut self, queue_id: u32) {
        // Whichever root context it is: those who wait are the VM's.
        reading::on_message(queue_id);
    }

    fn create_http_context(&self, context_id: u32) -> Option<Box<dyn HttpContext>> {
        #[cfg(feature = "test-hooks")]
        if let Some(reads) = self.reads {
            return Some(reads.context());
        }
        vm::with(|vm| vm.wake.note_request());
        // The SDK panics on `None`; a context without a configuration passes
        // everything on.
        let stream = self.config.as_ref().map(|config| Stream::new(context_id, config.clone()));
        Some(Box::new(Http { stream }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// The context of one request.
struct Http {
    stream: Option<Rc<RefCell<Stream>>>,
}

impl Http {
    fn with(&self, f: impl FnOnce(&mut Stream) -> Next) -> Action {
        vm::with(|vm| vm.wake.note_look());
        let next = self
            .stream
            .as_ref()
            .and_then(|stream| stream.try_borrow_mut().ok().map(|mut stream| f(&mut stream)));
        action(next.unwrap_or(Next::Continue))
    }
}

fn action(next: Next) -> Action {
    match next {
        Next::Continue => Action::Continue,
        Next::Pause => Action::Pause,
    }
}

impl Context for Http {}

impl HttpContext for Http {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        #[cfg(feature = "test-hooks")]
        hooks::crash_if_asked();
        self.stream.as_ref().map_or(Action::Continue, |stream| {
            action(Stream::on_request_headers(stream, end_of_stream))
        })
    }

    fn on_http_request_body(&mut self, body_size: usize, end_of_stream: bool) -> Action {
        #[cfg(feature = "test-hooks")]
        let _watch = hooks::Watch::start(hooks::Callback::Request);
        self.with(|stream| stream.on_request_body(body_size, end_of_stream))
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        self.with(Stream::on_request_trailers)
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        self.with(|stream| {
            stream.on_response_headers();
            Next::Continue
        })
    }

    fn on_http_response_body(&mut self, body_size: usize, end_of_stream: bool) -> Action {
        self.with(|stream| {
            stream.on_response_body(body_size, end_of_stream);
            Next::Continue
        })
    }

    fn on_log(&mut self) {
        self.with(|stream| {
            stream.end();
            Next::Continue
        });
    }
}
