//! Exchange: one HTTP request, as Envoy tells of it over one gRPC stream.
//!
//! A booking begins with the choice, leaves its prefill phase with the response's
//! headers, and ends with the stream.

use std::pin::Pin;
use std::sync::Arc;

use dynamo_kv_router::services::selection::{
    PromptRequest, SelectAndReserveRequest, SelectionService,
};
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_server::ExternalProcessor;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request as Told;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response as Reply;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ProcessingRequest,
    ProcessingResponse, StreamedBodyResponse, TrailersResponse,
};
use futures_util::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::prompt::Prompts;

/// The header that names the worker.
const DESTINATION: &str = "x-gateway-destination-endpoint";

/// Longest piece of a body that is streamed back, in bytes.
const PIECE_BYTES: usize = 62 * 1024;

/// What every stream needs.
#[derive(Clone)]
pub struct Picker {
    /// Template and tokenizer.
    pub prompts: Arc<Prompts>,
    /// Index, load, bookings.
    pub service: Arc<SelectionService>,
    /// Name of the model.
    pub model_name: Arc<str>,
}

/// A booking: freed when the stream ends, however it does.
struct Booking {
    service: Arc<SelectionService>,
    id: String,
}

impl Drop for Booking {
    fn drop(&mut self) {
        let (service, id) = (Arc::clone(&self.service), std::mem::take(&mut self.id));
        tokio::spawn(async move {
            if let Err(error) = service.free_reservation(&id).await {
                eprintln!("a booking was not freed: {error}");
            }
        });
    }
}

impl Picker {
    /// Chooses and books.
    async fn pick(&self, body: &[u8]) -> Result<(String, Booking), Status> {
        let prompt =
            self.prompts.of(body).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let request = SelectAndReserveRequest {
            model_name: self.model_name.to_string(),
            routing_group: "default".into(),
            selection_id: None,
            prompt: PromptRequest { token_ids: Some(prompt.tokens), ..PromptRequest::default() },
            router_config_override: None,
            expected_output_tokens: prompt.max_tokens,
            priority_jump: None,
            strict_priority: None,
            session_id: None,
            session_context: None,
            affinity_target: None,
            pinned_worker: None,
            allowed_worker_ids: None,
            routing_constraints: Default::default(),
        };
        let selected = self.service.select_and_reserve(request).await;
        let selected = selected.map_err(|error| Status::unavailable(error.to_string()))?;
        let id = selected.selection_id.unwrap_or_default();
        Ok((selected.endpoint, Booking { service: Arc::clone(&self.service), id }))
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Picker {
    type ProcessStream =
        Pin<Box<dyn Stream<Item = Result<ProcessingResponse, Status>> + Send + 'static>>;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Self::ProcessStream>, Status> {
        let (picker, mut told) = (self.clone(), request.into_inner());
        let replies = async_stream::try_stream! {
            let mut duplex = false;
            let mut body = Vec::new();
            let mut booking = None;
            while let Some(message) = told.message().await? {
                if let Some(protocol) = &message.protocol_config {
                    duplex = protocol.request_body_mode == BodySendMode::FullDuplexStreamed as i32;
                }
                match message.request {
                    // In duplex mode the answer waits for the body.
                    Some(Told::RequestHeaders(headers)) if !duplex || headers.end_of_stream => {
                        yield reply(Reply::RequestHeaders(HeadersResponse::default()));
                    }
                    Some(Told::RequestBody(part)) => {
                        let whole = part.end_of_stream;
                        if body.is_empty() {
                            body = part.body;
                        } else {
                            body.extend_from_slice(&part.body);
                        }
                        if !whole {
                            continue;
                        }
                        let (endpoint, booked) = picker.pick(&body).await?;
                        booking = Some(booked);
                        let named = CommonResponse {
                            header_mutation: Some(destination(endpoint)),
                            ..CommonResponse::default()
                        };
                        if duplex {
                            let headers = HeadersResponse { response: Some(named) };
                            yield reply(Reply::RequestHeaders(headers));
                            let pieces = body.chunks(PIECE_BYTES).count();
                            for (number, piece) in (1..).zip(body.chunks(PIECE_BYTES)) {
                                yield reply(streamed(piece, number == pieces));
                            }
                        } else {
                            yield reply(Reply::RequestBody(BodyResponse { response: Some(named) }));
                        }
                        body = Vec::new();
                    }
                    Some(Told::ResponseHeaders(_)) => {
                        yield reply(Reply::ResponseHeaders(HeadersResponse::default()));
                        if let Some(booking) = &booking {
                            let done = booking.service.prefill_complete(&booking.id).await;
                            done.map_err(|error| Status::internal(error.to_string()))?;
                        }
                    }
                    Some(Told::RequestTrailers(_)) => {
                        yield reply(Reply::RequestTrailers(TrailersResponse::default()));
                    }
                    _ => {}
                }
            }
            drop(booking);
        };
        Ok(Response::new(Box::pin(replies)))
    }
}

fn reply(response: Reply) -> ProcessingResponse {
    ProcessingResponse { response: Some(response), ..ProcessingResponse::default() }
}

fn destination(endpoint: String) -> HeaderMutation {
    let header = HeaderValue {
        key: DESTINATION.into(),
        raw_value: endpoint.into_bytes(),
        ..HeaderValue::default()
    };
    let option = HeaderValueOption {
        header: Some(header),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..HeaderValueOption::default()
    };
    HeaderMutation { set_headers: vec![option], ..HeaderMutation::default() }
}

fn streamed(piece: &[u8], last: bool) -> Reply {
    let response = StreamedBodyResponse {
        body: piece.to_vec(),
        end_of_stream: last,
        ..StreamedBodyResponse::default()
    };
    Reply::RequestBody(BodyResponse {
        response: Some(CommonResponse {
            body_mutation: Some(BodyMutation {
                mutation: Some(Mutation::StreamedResponse(response)),
            }),
            ..CommonResponse::default()
        }),
    })
}
