//! Response: what is read of an answer while it passes by.

use warmpath_core::usage::ResponseReader;

use super::Stream;
use crate::config::Mode;
use crate::host::{self, Buffer, Headers};
use crate::metrics::Counter;
use crate::pairing;
use crate::place::Placed;
use crate::vm;

impl Stream {
    /// The response's headers are here.
    pub fn on_response_headers(&mut self) {
        if let Some(Placed { choice, .. }) = &self.placed {
            self.response = Some(ResponseReader::default());
            let endpoint = &choice.serving.endpoint;
            if self.config.mode == Mode::Buffer && !endpoint.is_empty() {
                pairing::check_answer(endpoint);
            }
        }
        if !self.config.debug_headers {
            return;
        }
        let Some(reason) = self.reason else { return };
        let mut headers = vec![("x-warmpath-reason", reason.word().to_owned())];
        if let Some(Placed { choice, .. }) = &self.placed {
            headers.extend(choice.debug_headers(self.decision_us));
        }
        for (name, value) in headers {
            let _ = host::set_header(Headers::Response, name, &value);
        }
    }

    /// A chunk of the response is here.
    pub fn on_response_body(&mut self, len: usize, is_end: bool) {
        let Some(placed) = &mut self.placed else { return };
        if len > 0 {
            // An answer that comes at once ends as it begins: its end says all.
            if self.streams && !core::mem::replace(&mut self.response_began, true) {
                vm::with(|vm| vm.response_began(placed));
            }
            if let (Some(response), Some(chunk)) =
                (&mut self.response, host::buffer(Buffer::ResponseBody, 0, len))
            {
                response.feed(&chunk);
                let tokens = response.take_new_tokens();
                if tokens > 0 {
                    vm::with(|vm| vm.answered(placed, tokens));
                }
            }
        }
        if is_end {
            self.observe();
        }
    }

    /// Compares what the engine reports with what was predicted.
    fn observe(&mut self) {
        let Some(usage) = self.response.take().and_then(ResponseReader::finish) else { return };
        let Some(cached) = usage.cached_tokens else { return };
        let Some(placed) = &self.placed else { return };
        if !self.exact_prediction {
            return;
        }
        let predicted = u64::from(placed.choice.predicted_cached_tokens);
        let result =
            if cached == predicted { Counter::PredictionsExact } else { Counter::PredictionsOff };
        vm::with(|vm| {
            vm.metrics.add(Counter::ObservedCachedTokens, cached);
            vm.metrics.add(result, 1);
        });
    }
}
