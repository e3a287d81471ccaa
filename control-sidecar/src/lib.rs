//! Native sidecar of Warmpath.
