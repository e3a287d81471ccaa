//! Plane
pub mod cursor;
pub mod recovery;
pub mod request;
