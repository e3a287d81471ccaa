//! Every upper bound of the sidecar, with its unit and its reason.
//!
//! Bounds of what travels on the feed are in `warmpath_core::limits`. Whoever
//! enforces one counts it, so that reaching it is seen.

use std::time::Duration;

// --- state -----------------------------------------------------------------

/// Pages remembered for a rank whose cache size is not known, in blocks of the
/// model's size.
pub const RANK_BLOCKS_DEFAULT: u64 = 1 << 20;

/// Pages remembered for a rank, as a multiple of what its cache holds: shared
/// prefixes are counted once, but copies and tombstones are counted too.
pub const RANK_BLOCKS_FACTOR: u64 = 4;

/// Pages remembered for a rank in all its tiers, whatever its configuration
/// says: 8 Mi pages take about half a gigabyte.
pub const RANK_PAGES_MAX: u64 = 8 << 20;

/// Pages of a rank that are not indexed but whose removal is awaited.
pub const RANK_PASSED_OVER_MAX: usize = 65_536;

/// Blocks of a rank's lower tiers that wait for their parents. A dump of a tier
/// comes in no order, so all but a few of its blocks wait for a moment.
pub const RANK_ORPHANS_MAX: usize = 1 << 20;

/// Groups of caches of one rank whose kind is remembered. Hybrid models have
/// about five.
pub const RANK_GROUPS_MAX: usize = 64;

/// Copies of one page that are counted.
pub const PAGE_COPIES_MAX: u32 = 1 << 16;

/// Pages that complete a block of which the same smaller page is a part: as many
/// continuations of one prompt, cached at the same time.
pub const PAGE_COMPLETED_BY_MAX: usize = 1_024;

// --- sources ---------------------------------------------------------------

/// Longest message of a publisher, in bytes, all frames together. A batch of
/// 100 000 removals is 1 MB.
pub const MESSAGE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Most frames of one message. Replies have four.
pub const MESSAGE_FRAMES_MAX: usize = 8;

/// Live messages held back while a gap is repaired. Engines keep 10 000 for
/// replays unless told otherwise: behind so many more, what is missing is gone.
pub const HELD_MESSAGES_MAX: usize = 16_384;

/// Bytes of live messages held back while a gap is repaired.
pub const HELD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Replays asked for before a gap is given up.
pub const REPLAY_ATTEMPTS_MAX: u32 = 3;

/// Longest wait for a publisher to accept a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest silence of a replay that is not complete.
pub const REPLAY_SILENCE: Duration = Duration::from_secs(5);

/// Longest replay altogether.
pub const REPLAY_TIMEOUT: Duration = Duration::from_secs(60);

/// Quiet time after which a stream's tail is checked once by a replay: what the
/// publisher dropped last is not followed by anything that would show the gap.
pub const TAIL_CHECK_AFTER: Duration = Duration::from_secs(1);

/// First and longest pause between two attempts to connect.
pub const RECONNECT_PAUSE: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_secs(1));

/// Silence after which a publisher that can answer is asked for a sign of life,
/// and how long the answer may take.
pub const PING_AFTER: Duration = Duration::from_secs(10);

/// Updates of all sources together that wait for the state. A full queue makes
/// the sources wait, and the publishers drop, which shows as a gap.
pub const UPDATES_QUEUED_MAX: usize = 1_024;

// --- feed ------------------------------------------------------------------

/// Bytes of log frames kept for followers that reconnect or lag.
pub const LOG_BYTES_DEFAULT: usize = 64 * 1024 * 1024;

/// Frames kept, whatever their size.
pub const LOG_FRAMES_MAX: usize = 262_144;

/// Shortest time between two delta frames that are not full, and so the longest
/// that a change waits for others to share its frame: a frame costs every VM of a
/// gateway some 10 µs.
pub const FLUSH_EVERY: Duration = Duration::from_millis(1);

/// Shortest time between two roster frames.
pub const ROSTER_AFTER: Duration = Duration::from_millis(20);

/// Streams of filters at a time. A gateway process has one follower, and at its
/// start one snapshot reader a worker thread.
pub const STREAMS_MAX: usize = 1_024;

/// Snapshots under way at a time. Each may hold back a copy of every rank that
/// changes meanwhile.
pub const SNAPSHOTS_MAX: usize = 8;

/// Longest time without credit before a snapshot is given up.
pub const SNAPSHOT_STALL: Duration = Duration::from_secs(30);

/// Frames between a stream's task and its connection.
pub const STREAM_FRAMES_QUEUED: usize = 16;

/// Log frames taken from the log at a time.
pub const LOG_FRAMES_TAKEN: usize = 64;

/// Longest frame that a filter sends, in bytes: bookings with the blocks of their
/// prompts.
pub const UP_BYTES_MAX: usize = warmpath_core::limits::BOOKINGS_FRAME_BYTES
    + warmpath_core::limits::BOOKING_ENTRY_BYTES_MAX
    + 16 * 1024;

/// Most credit that a stream can collect, in parts.
pub const CREDIT_MAX: u64 = 1 << 32;

/// Blobs that a follower has asked for and not yet got.
pub const FETCHES_MAX: usize = 256;

/// How long the first synchronisation may take before filters are told to drop
/// the index they had.
pub const SYNC_DEADLINE_DEFAULT: Duration = Duration::from_secs(3);

// --- files -----------------------------------------------------------------

/// Longest configuration or worker file, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Mistakes reported at a time.
pub const MISTAKES_MAX: usize = 100;

/// Pause between two looks at the worker file.
pub const WORKERS_FILE_EVERY: Duration = Duration::from_millis(250);

/// Longest file of a model's directory but the tokenizer, in bytes.
pub const MODEL_FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Compiled tokenizers kept on disk, of at most 13 MB each.
pub const CACHE_FILES_MAX: usize = 16;

/// Longest time to fetch one file that a model card names. A tokenizer has at
/// most 34 MB.
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes that are copied at a time of a file that lies on this host.
pub const COPY_CHUNK_BYTES: usize = 1024 * 1024;

/// First and longest pause before a model's files are fetched again.
pub const FETCH_RETRY_PAUSE: (Duration, Duration) =
    (Duration::from_millis(250), Duration::from_secs(10));

/// Attempts to load models that wait for the keeper.
pub const ATTEMPTS_QUEUED: usize = 8;

// --- discovery -------------------------------------------------------------

/// Longest discovery record, in bytes. etcd and Kubernetes store at most 1.5 MB;
/// a card takes about 3 KB.
pub const RECORD_BYTES_MAX: usize = 1024 * 1024;

/// Most discovery records that are kept: about eight for each of the most
/// workers that a roster holds.
pub const RECORDS_MAX: usize = 65_536;

/// Most data-parallel ranks of one instance.
pub const INSTANCE_RANKS_MAX: u32 = 1_024;

/// Most alternatives of what a model card needs, and most parts of one.
pub const CARD_NEEDS_MAX: usize = 16;

/// Most extra files of a model card that are looked at.
pub const CARD_EXTRA_FILES_MAX: usize = 64;

/// Most LoRA adapters of a fleet.
pub const FLEET_ADAPTERS_MAX: usize = 4_096;

/// Most publishers of requests' steps of a fleet: a router each, and the workers.
pub const FLEET_SEQUENCE_STREAMS_MAX: usize = 16_384;

/// Most publishers of load of a fleet: two for each of the most workers.
pub const FLEET_LOAD_STREAMS_MAX: usize = 16_384;

/// Most problems of a fleet that are kept; the rest is one problem that says
/// how many.
pub const FLEET_PROBLEMS_MAX: usize = 256;

/// Longest name of what a problem is about, in bytes.
pub const PROBLEM_NAME_BYTES_MAX: usize = 200;

/// Sights of a backend that wait to be joined. Each is the whole of what it
/// sees, so one is enough; a backend makes the next when that is taken.
pub const SIGHTS_QUEUED_MAX: usize = 1;

/// Time that changes of a backend have to come together before they are told:
/// a worker that starts writes its records one after the other.
pub const SIGHT_SETTLES_AFTER: Duration = Duration::from_millis(50);

/// Pause between two looks at Dynamo's file store.
pub const FILE_STORE_EVERY: Duration = Duration::from_millis(200);

/// Age from which a file of Dynamo's file store counts as left behind: its owner
/// touches it every few seconds, and any peer may remove it after so long.
pub const FILE_STORE_EXPIRES_AFTER: Duration = Duration::from_secs(10);

/// First and longest pause before a backend that failed is asked again.
pub const BACKEND_PAUSE: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(5));

/// Longest wait for a backend's answer to one question.
pub const BACKEND_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a silent etcd is asked for a sign of life, and how long it has.
pub const ETCD_KEEPALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(5));

/// Keys that etcd is asked for at a time.
pub const ETCD_PAGE_KEYS: i64 = 500;

/// Longest answer of etcd, in bytes: a page of cards ten times the usual size.
pub const ETCD_ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Objects that the API server of Kubernetes is asked for at a time.
pub const KUBERNETES_PAGE_OBJECTS: u32 = 500;

/// Objects of one kind that are kept.
pub const KUBERNETES_OBJECTS_MAX: usize = 16_384;

/// How long the API server is asked to keep one watch open. It also bounds how
/// long a connection that has silently died goes unnoticed.
pub const KUBERNETES_WATCH_FOR: Duration = Duration::from_secs(120);

/// How much longer than asked for a watch may stay open.
pub const KUBERNETES_WATCH_GRACE: Duration = Duration::from_secs(5);

/// Changes of one kind of objects that wait.
pub const KUBERNETES_CHANGES_QUEUED_MAX: usize = 64;

/// Time between two looks at what an engine serves: adapters come and go.
pub const PROBE_EVERY: Duration = Duration::from_secs(5);

/// Longest time that an engine may take to answer one question.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest answer of an engine, in bytes. A thousand adapters take 300 KB.
pub const PROBE_BYTES_MAX: usize = 1024 * 1024;

/// Engines that are asked at a time.
pub const PROBES_MAX: usize = 16;
// --- event plane -----------------------------------------------------------

/// Events of one rank held back while its history is asked for. Workers keep
/// as many to answer from.
pub const PLANE_EVENTS_HELD_MAX: usize = 1_024;

/// Queries for history that are tried again before a rank is followed live
/// only.
pub const RECOVERY_RETRIES_MAX: u32 = 8;

/// Pause before the first of them, doubled with each.
pub const RECOVERY_PAUSE: Duration = Duration::from_millis(200);

/// Longest wait before a rank's first query, so that a fleet that appears at
/// once does not ask at once.
pub const RECOVERY_JITTER: Duration = Duration::from_millis(3);

/// Longest query for history, with its answer.
pub const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// Queries at a time.
pub const RECOVERY_QUERIES_MAX: usize = 16;

/// Connections that call back and have not yet said for which query.
pub const RECOVERY_CALLBACKS_MAX: usize = 64;

/// How long such a connection has to say so.
pub const RECOVERY_CALLBACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest header of a frame of an answer, in bytes.
pub const RECOVERY_HEADER_BYTES_MAX: usize = 16 * 1024;

/// Longest body of a frame of an answer, in bytes: about a million blocks.
pub const RECOVERY_BODY_BYTES_MAX: usize = 96 * 1024 * 1024;

/// Longest answer, all frames together, in bytes.
pub const RECOVERY_ANSWER_BYTES_MAX: usize = 128 * 1024 * 1024;

/// Most frames of one answer. There are five.
pub const RECOVERY_FRAMES_MAX: usize = 64;

/// Most events of one answer. A dump has one for each run of blocks.
pub const RECOVERY_EVENTS_MAX: usize = 1 << 20;

/// How long a rank that is followed live only waits before it asks again.
pub const RECOVERY_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Most steps of requests in one message of a router. Routers send 256.
pub const SEQUENCE_EVENTS_MAX: usize = 4_096;

/// Messages of one publisher on a shared subject that wait for its rank. More
/// are dropped, which shows as a gap and is repaired.
pub const PLANE_MESSAGES_QUEUED: usize = 1_024;

/// Bytes of such messages.
pub const PLANE_BYTES_QUEUED: usize = 16 * 1024 * 1024;

/// Messages of one subject that the NATS client holds for us.
pub const NATS_MESSAGES_QUEUED: usize = 65_536;

/// Messages remembered to know those that come from a second broker.
pub const BROKER_MESSAGES_REMEMBERED: usize = 100_000;

// --- replicas --------------------------------------------------------------

/// Frames and comings and goings of gateways that wait to be taken in. Beyond it
/// a stream is ended, and begins again with a list.
pub const UPLINKS_QUEUED: usize = 1_024;

/// Frames of other routers' bookings that wait for the slowest filter. One that
/// is slower gets the list again.
pub const REMOTE_FRAMES_QUEUED: usize = 1_024;

/// Gateways that attach to one sidecar, and other sidecars that list what they
/// have booked.
pub const GATEWAYS_MAX: usize = 1_024;

/// How long a gateway may be away before what it had booked counts as over: its
/// VMs take a second to agree on who follows the feed.
pub const GATEWAY_GRACE: Duration = Duration::from_secs(5);

/// Blocks of all remote bookings together: 128 MiB.
pub const REMOTE_BLOCKS_MAX: usize = 16 * 1024 * 1024;

/// Requests whose end is remembered, so that what was said before it and comes
/// behind it does not bring them back.
pub const ENDED_REMEMBERED: usize = 16_384;

/// What was booked so shortly before a list began may be missing from it, in
/// milliseconds: the two come over different connections.
pub const LIST_RACE_MS: u64 = 2_000;

/// How often a sidecar says all that its gateways have booked: what got lost is
/// made up for, and what runs long does not expire.
pub const ACCOUNT_EVERY: Duration = Duration::from_secs(30);

/// Time that newcomers have to come together before they are told all of it.
pub const ACCOUNT_AFTER: Duration = Duration::from_millis(50);

/// Bytes from which a message of such an account is sent: NATS takes a megabyte.
pub const ACCOUNT_BYTES: usize = 256 * 1024;

/// Steps of requests in one message, as many as Dynamo's routers take, and how
/// long the first waits for others.
pub const SEQUENCES_BATCH: (usize, Duration) = (256, Duration::from_millis(1));

/// Steps that wait to be said. Dynamo's routers hold as many.
pub const SEQUENCES_QUEUED_MAX: usize = 100_000;

/// Messages of ours that wait for one subscriber, broker or NATS.
pub const PUBLISHED_QUEUED: usize = 1_024;

/// Subscribers of one publisher of ours, and topics that one may want.
pub const SUBSCRIBERS_MAX: usize = 1_024;

/// Messages of other routers and workers that wait to be taken in.
pub const SEQUENCES_HEARD_QUEUED: usize = 1_024;

/// How often what is over is looked for.
pub const BOOKINGS_LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often the addresses of other sidecars that the configuration names are
/// looked up, and how many there may be.
pub const PEERS_LOOK_EVERY: Duration = Duration::from_secs(2);

/// See [`PEERS_LOOK_EVERY`].
pub const PEERS_MAX: usize = 256;

/// How often our records in Dynamo's file store are written anew: a third of the
/// age from which they count as left behind.
pub const FILE_STORE_TOUCHED_EVERY: Duration = Duration::from_secs(3);

/// How long our records stay in etcd when we are gone, in seconds; Dynamo's own.
pub const ETCD_LEASE_TTL_S: i64 = 30;

// --- who may connect -------------------------------------------------------

/// Longest file of a certificate, key, authorities or tokens, in bytes.
pub const CREDENTIAL_BYTES_MAX: u64 = 1024 * 1024;

/// Pause between two looks at such files.
pub const CREDENTIALS_EVERY: Duration = Duration::from_secs(1);

/// Tokens that are accepted at the same time: the old and the new one, for a few
/// clients.
pub const TOKENS_MAX: usize = 8;

/// Length of a token, in bytes. A shorter one can be guessed.
pub const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 16..=4_096;

/// Names of clients that a server lets in.
pub const ALLOWED_NAMES_MAX: usize = 64;

/// Connections that one server holds open: every VM of every gateway has two.
pub const SERVER_CONNECTIONS_MAX: usize = 4_096;

/// Connections that wait for the server to take them.
pub const CONNECTIONS_QUEUED: usize = 64;

/// Handshakes under way at the same time, and how long each may take.
pub const HANDSHAKES_MAX: usize = 256;

/// See [`HANDSHAKES_MAX`].
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

// --- pulled events ---------------------------------------------------------

/// Pause between two looks at a server's buffer of events. It is emptied with
/// each, and what does not fit is lost.
pub const PULL_EVERY: Duration = Duration::from_millis(50);

/// Longest look.
pub const PULL_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer, in bytes: 100 bytes a token, of 80 000 tokens.
pub const PULL_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Answers of one server that wait for its slowest rank. More are dropped,
/// which shows as a gap.
pub const PULL_ANSWERS_QUEUED: usize = 64;

// --- load ------------------------------------------------------------------

/// Streams of load followed. Three for each rank of the largest roster.
pub const LOAD_STREAMS_MAX: usize = 3 * warmpath_core::limits::ROSTER_WORKERS_MAX;

/// Ranks that one stream of load may speak of.
pub const LOAD_RANKS_MAX: usize = 4_096;

/// Shortest time between two looks at how full caches are.
pub const USAGE_AFTER: Duration = Duration::from_millis(100);

/// Longest time until filters are told again.
pub const USAGE_EVERY: Duration = Duration::from_secs(2);

/// Age from which a share is not known any more, if whoever says it does so at
/// least every second. What is said on change only does not age.
pub const USAGE_STALE_AFTER: Duration = Duration::from_secs(10);

/// Shortest time between two accounts of one rank's load.
pub const LOAD_EVERY: Duration = Duration::from_millis(100);

/// Pause between two looks at a page for Prometheus, and the longest look.
pub const SCRAPE_EVERY: Duration = Duration::from_secs(1);

/// Longest page for Prometheus, in bytes.
pub const SCRAPE_BYTES_MAX: usize = 8 * 1024 * 1024;

// --- endpoint picker -------------------------------------------------------

/// Most threads of the endpoint picker.
pub const PICKER_THREADS_MAX: u64 = 64;

/// Requests at the endpoint picker at a time. Each has a stream of its own for as
/// long as its answer takes.
pub const PICKER_STREAMS_MAX: usize = 16_384;

/// Of those, requests of one connection.
pub const PICKER_STREAMS_PER_CONNECTION_MAX: u32 = 4_096;

/// Longest message of a gateway, in bytes: with the mode that holds bodies a whole
/// one, and our configurations let Envoy hold 32 MiB.
pub const PICKER_MESSAGE_BYTES_MAX: usize = 34 * 1024 * 1024;

/// Longest piece of a body that is sent back, in bytes: Envoy takes 64 KiB.
pub const PICKER_PIECE_BYTES_MAX: usize = 62_000;

/// Answers that wait for the gateway to take them.
pub const PICKER_REPLIES_QUEUED: usize = 32;

/// Text that is read between two looks at the clock, in bytes.
pub const PICKER_STEP_BYTES: usize = 64 * 1024;

/// Time between two looks at bookings that run out, at the picker's index and the
/// like.
pub const PICKER_TICK: Duration = Duration::from_millis(100);

/// The same while some of it is under way.
pub const PICKER_TICK_BUSY: Duration = Duration::from_millis(2);

/// Bookings that are refreshed at a time.
pub const PICKER_REFRESHES: usize = 1_024;
