{{/* Names and parts that several templates need. */}}

{{- define "warmpath.sidecar" -}}
{{- default (printf "%s-sidecar" .Release.Name) .Values.sidecar.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "warmpath.gatewayNamespace" -}}
{{- default .Release.Namespace .Values.gateway.namespace -}}
{{- end -}}

{{- define "warmpath.workersNamespace" -}}
{{- default .Release.Namespace .Values.workers.namespace -}}
{{- end -}}

{{- define "warmpath.routeNamespace" -}}
{{- default (include "warmpath.workersNamespace" .) .Values.route.namespace -}}
{{- end -}}

{{- define "warmpath.selectorLabels" -}}
app.kubernetes.io/name: warmpath
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "warmpath.labels" -}}
{{ include "warmpath.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "warmpath.sidecarLabels" -}}
{{ include "warmpath.selectorLabels" . }}
app.kubernetes.io/component: sidecar
{{- end -}}

{{/* Who reads the cluster: the sidecar's account, or that of the gateway it is in. */}}
{{- define "warmpath.serviceAccount" -}}
{{- if eq .Values.sidecar.placement "gateway" -}}
{{- default (printf "%s-istio" .Values.gateway.name) .Values.gateway.serviceAccount -}}
{{- else -}}
{{- default (include "warmpath.sidecar" .) .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "warmpath.serviceAccountNamespace" -}}
{{- if eq .Values.sidecar.placement "gateway" -}}
{{- include "warmpath.gatewayPodNamespace" . -}}
{{- else -}}
{{- .Release.Namespace -}}
{{- end -}}
{{- end -}}

{{- define "warmpath.gatewayPodNamespace" -}}
{{- default (include "warmpath.gatewayNamespace" .) .Values.networkPolicy.gatewayPodNamespace -}}
{{- end -}}

{{- define "warmpath.sidecarImage" -}}
{{- with .Values.sidecar.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether the proxy's cluster of the feed is of our own making. A container beside
     the proxy, and Envoy Gateway, need it so. */}}
{{- define "warmpath.ownFeedCluster" -}}
{{- with .Values.feed -}}
{{- if and (eq .tlsMode "ISTIO_MUTUAL") (not $.Values.sidecar.meshInjection) -}}
{{- fail "feed.tlsMode ISTIO_MUTUAL needs sidecar.meshInjection: nobody else would end that TLS" -}}
{{- end -}}
{{- if and (eq .tlsMode "MUTUAL") (not (and .clientCertificate .privateKey)) -}}
{{- fail "feed.tlsMode MUTUAL needs clientCertificate and privateKey" -}}
{{- end -}}
{{- $own := or (eq .cluster "own") (eq $.Values.sidecar.placement "gateway") (eq $.Values.gateway.provider "envoy-gateway") -}}
{{- if and $own (has .tlsMode (list "ISTIO_MUTUAL" "DISABLE")) -}}
{{- fail "feed.tlsMode ISTIO_MUTUAL and DISABLE need feed.cluster service" -}}
{{- end -}}
{{- if $own -}}yes{{- end -}}
{{- end -}}
{{- end -}}

{{- define "warmpath.feedHost" -}}
{{ include "warmpath.sidecar" . }}.{{ .Release.Namespace }}.svc.cluster.local
{{- end -}}

{{- define "warmpath.feedCluster" -}}
{{- if include "warmpath.ownFeedCluster" . -}}
warmpath_feed
{{- else -}}
outbound|{{ .Values.sidecar.feedPort }}||{{ include "warmpath.feedHost" . }}
{{- end -}}
{{- end -}}

{{/* The filter's configuration. */}}
{{- define "warmpath.filterConfig" -}}
{{- $own := dict "mode" .Values.mode "feed_cluster" (include "warmpath.feedCluster" .) -}}
{{- toYaml (merge $own .Values.filter) -}}
{{- end -}}

{{/* One stream a gateway, which notices within a second that the sidecar hangs. */}}
{{- define "warmpath.feedProtocol" -}}
envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
  "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
  explicit_http_config:
    http2_protocol_options:
      initial_stream_window_size: 8388608
      initial_connection_window_size: 16777216
      connection_keepalive: {interval: 0.5s, timeout: 0.5s}
{{- end -}}

{{- define "warmpath.feedClusterResource" -}}
name: warmpath_feed
{{- if eq .Values.sidecar.placement "gateway" }}
type: STATIC
{{- else }}
type: STRICT_DNS
{{- end }}
connect_timeout: 0.25s
typed_extension_protocol_options:
  {{- include "warmpath.feedProtocol" . | nindent 2 }}
circuit_breakers:
  thresholds:
  - {max_connections: 64, max_pending_requests: 64, max_requests: 256, max_retries: 3}
{{- with .Values.feed }}
{{- if and .tlsMode (ne $.Values.sidecar.placement "gateway") }}
transport_socket:
  name: envoy.transport_sockets.tls
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
    sni: {{ default (include "warmpath.feedHost" $) .sni }}
    common_tls_context:
      alpn_protocols: [h2]
      {{- if eq .tlsMode "MUTUAL" }}
      tls_certificates:
      - certificate_chain: {filename: {{ .clientCertificate }}}
        private_key: {filename: {{ .privateKey }}}
      {{- end }}
      {{- if not .insecureSkipVerify }}
      validation_context:
        trusted_ca: {filename: {{ required "feed.caCertificates: the CA of the sidecar's certificate" .caCertificates }}}
        match_typed_subject_alt_names:
        {{- range default (list (include "warmpath.feedHost" $)) .subjectAltNames }}
        - {san_type: {{ ternary "URI" "DNS" (hasPrefix "spiffe://" .) }}, matcher: {exact: {{ . | quote }}}}
        {{- end }}
      {{- end }}
{{- end }}
{{- end }}
load_assignment:
  cluster_name: warmpath_feed
  endpoints:
  - lb_endpoints:
    - endpoint:
        address:
          socket_address:
            {{- if eq .Values.sidecar.placement "gateway" }}
            address: 127.0.0.1
            {{- else }}
            address: {{ include "warmpath.feedHost" . }}
            {{- end }}
            port_value: {{ .Values.sidecar.feedPort }}
{{- end -}}

{{/* The workers' cluster takes the address that the filter names; a request
     without one goes to the least busy worker. */}}
{{- define "warmpath.loadBalancing" -}}
policies:
- typed_extension_config:
    name: envoy.load_balancing_policies.override_host
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost
      override_host_sources:
      - {header: x-gateway-destination-endpoint}
      fallback_policy:
        policies:
        - typed_extension_config:
            name: envoy.load_balancing_policies.least_request
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest
{{- end -}}

{{/* The wasm filter. Takes a dict of the root and of `code`, where the module is. */}}
{{- define "warmpath.wasm" -}}
{{- $root := .root -}}
"@type": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
config:
  name: warmpath
  root_id: warmpath
  {{- if eq $root.Values.mode "endpoint" }}
  # Without it a held header phase never ends. Envoy 1.35 or later.
  allow_on_headers_stop_iteration: true
  {{- end }}
  failure_policy: {{ $root.Values.module.failStrategy | replace "FAIL_CLOSE" "FAIL_CLOSED" }}
  {{- if eq $root.Values.module.failStrategy "FAIL_RELOAD" }}
  reload_config: {backoff: {base_interval: {{ $root.Values.envoy.reloadBackoff }}}}
  {{- end }}
  {{- if $root.Values.envoy.restrictHostCalls }}
  # All that the module may ask of Envoy, and be asked by it.
  capability_restriction_config:
    allowed_capabilities:
      {{- range tuple
          "clock_time_get" "proxy_continue_stream" "proxy_define_metric" "proxy_dequeue_shared_queue"
          "proxy_enqueue_shared_queue" "proxy_get_buffer_bytes" "proxy_get_current_time_nanoseconds"
          "proxy_get_header_map_pairs" "proxy_get_property" "proxy_get_shared_data" "proxy_grpc_cancel"
          "proxy_grpc_close" "proxy_grpc_send" "proxy_grpc_stream" "proxy_increment_metric" "proxy_log"
          "proxy_record_metric" "proxy_register_shared_queue" "proxy_remove_header_map_value"
          "proxy_replace_header_map_value" "proxy_resolve_shared_queue" "proxy_send_local_response"
          "proxy_set_buffer_bytes" "proxy_set_effective_context" "proxy_set_property"
          "proxy_set_shared_data" "proxy_set_tick_period_milliseconds" "proxy_on_configure"
          "proxy_on_context_create" "proxy_on_delete" "proxy_on_done" "proxy_on_grpc_close"
          "proxy_on_grpc_receive" "proxy_on_log" "proxy_on_queue_ready" "proxy_on_request_body"
          "proxy_on_request_headers" "proxy_on_request_trailers" "proxy_on_response_body"
          "proxy_on_response_headers" "proxy_on_response_trailers" "proxy_on_tick" "proxy_on_vm_start" }}
      {{ . }}: {}
      {{- end }}
  {{- end }}
  vm_config:
    vm_id: {{ $root.Values.envoy.vmId }}
    runtime: envoy.wasm.runtime.v8
    code:
      {{- .code | nindent 6 }}
  configuration:
    "@type": type.googleapis.com/google.protobuf.StringValue
    value: |
      {{ include "warmpath.filterConfig" $root | fromYaml | toJson }}
{{- end -}}

{{/* A client must not choose its worker. Families with a free part in their name
     are left to the module: removing by prefix needs a newer Envoy than modes body
     and buffer do, and none of them names a host here. */}}
{{- define "warmpath.strip" -}}
"@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
mutations:
  request_mutations:
  {{- range tuple
      "x-gateway-destination-endpoint"
      "x-gateway-destination-endpoint-subset"
      "x-gateway-destination-endpoint-served"
      "x-gateway-destination-endpoint-fallback"
      "x-dynamo-worker-instance-id"
      "x-dynamo-prefill-instance-id"
      "x-dynamo-dp-rank"
      "x-dynamo-prefill-dp-rank"
      "x-dynamo-routing-mode"
      "x-dynamo-token-data"
      "x-dynamo-backend-instance-id"
      "x-dynamo-decode-worker-id"
      "x-dynamo-prefill-worker-id"
      "x-dynamo-epp-booking-id"
      "x-dynamo-epp-prefill-reservation-id"
      "x-worker-instance-id"
      "x-prefill-instance-id"
      "x-dp-rank"
      "x-data-parallel-rank"
      "x-prefill-dp-rank"
      "x-prefiller-host-port"
      "x-prefiller-url"
      "x-encoder-hosts-ports"
      "x-data-parallel-host-port"
      "x-kv-cache-source-host-port"
      "x-llm-d-prefiller-host-port"
      "x-llm-d-encoder-hosts-ports"
      "x-llm-d-data-parallel-host-port"
      "x-gateway-model-name"
      "x-gateway-base-model-name"
      "x-gateway-model-name-rewrite"
      "x-gateway-inference-fairness-id"
      "x-gateway-inference-objective"
      "x-tenant-id"
      "routing-strategy"
      "external-filter"
      "target-pod"
      "x-envoy-original-dst-host"
      "test-epp-endpoint-selection"
      "x-warmpath-worker"
      "x-warmpath-prefill-worker"
      "x-warmpath-endpoint"
      "x-warmpath-predicted-cached-tokens"
      "x-warmpath-reason"
      "x-warmpath-decision-us" }}
  - remove: {{ . }}
  {{- end }}
{{- end -}}

{{/* Mode buffer: what the filter has left in filter state becomes headers. */}}
{{- define "warmpath.write" -}}
"@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
mutations:
  request_mutations:
  {{- range $header, $key := dict
      "x-gateway-destination-endpoint" "warmpath_destination"
      "x-dynamo-worker-instance-id" "warmpath_worker"
      "x-dynamo-dp-rank" "warmpath_dp_rank"
      "x-dynamo-prefill-instance-id" "warmpath_prefill_worker"
      "x-dynamo-prefill-dp-rank" "warmpath_prefill_dp_rank"
      "x-dynamo-routing-mode" "warmpath_routing_mode"
      "x-prefiller-host-port" "warmpath_prefiller" }}
  - append:
      header: {key: {{ $header }}, value: "%FILTER_STATE(wasm.{{ $key }}:PLAIN)%"}
      append_action: OVERWRITE_IF_EXISTS_OR_ADD
  {{- end }}
{{- end -}}

{{/* The sidecar's container. Takes a dict of the root and of `beside`: whether it is
     in a gateway pod. There it has no say in readiness: without it the gateway
     serves on. */}}
{{- define "warmpath.container" -}}
{{- $beside := .beside -}}
{{- $ := .root -}}
{{- with $.Values.sidecar -}}
name: warmpath-sidecar
image: {{ include "warmpath.sidecarImage" $ }}
imagePullPolicy: {{ .image.pullPolicy }}
command: [warmpath-sidecar]
args: [--config, /etc/warmpath/sidecar.yaml, --log-format, json]
env:
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
# Where workers are looked for.
- {name: POD_NAMESPACE, value: {{ include "warmpath.workersNamespace" $ }}}
# Where other routers reach this one, if bookings are told.
- {name: DYN_EVENT_PLANE_HOST, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- with .envFrom }}
envFrom:
{{ toYaml . }}
{{- end }}
ports:
{{- if not $beside }}
- {name: grpc-feed, containerPort: {{ .feedPort }}}
{{- end }}
- {name: http-status, containerPort: {{ .statusPort }}}
- {name: tcp-recovery, containerPort: {{ .recoveryPort }}}
{{- if $.Values.pool.endpointPicker.enabled }}
- {name: grpc-picker, containerPort: {{ $.Values.pool.endpointPicker.port }}}
- {name: grpc-health, containerPort: {{ $.Values.pool.endpointPicker.healthPort }}}
{{- end }}
startupProbe:
  httpGet: {path: {{ ternary "/healthz" "/readyz" $beside }}, port: http-status}
  periodSeconds: {{ .startupProbe.periodSeconds }}
  failureThreshold: {{ .startupProbe.failureThreshold }}
{{- if not $beside }}
readinessProbe:
  httpGet: {path: /readyz, port: http-status}
  periodSeconds: {{ .readinessProbe.periodSeconds }}
  failureThreshold: {{ .readinessProbe.failureThreshold }}
{{- end }}
livenessProbe:
  httpGet: {path: /healthz, port: http-status}
  periodSeconds: {{ .livenessProbe.periodSeconds }}
  failureThreshold: {{ .livenessProbe.failureThreshold }}
resources:
  {{- toYaml .resources | nindent 2 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
volumeMounts:
- {name: warmpath-config, mountPath: /etc/warmpath/sidecar.yaml, subPath: sidecar.yaml, readOnly: true}
- {name: warmpath-cache, mountPath: /var/cache/warmpath}
{{- if .tlsSecret }}
- {name: warmpath-tls, mountPath: /etc/warmpath/tls, readOnly: true}
{{- end }}
{{- with .volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "warmpath.volumes" -}}
- name: warmpath-config
  configMap: {name: {{ include "warmpath.sidecar" . }}}
- name: warmpath-cache
  emptyDir: {sizeLimit: 1Gi}
{{- with .Values.sidecar.tlsSecret }}
- name: warmpath-tls
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- with .Values.sidecar.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
