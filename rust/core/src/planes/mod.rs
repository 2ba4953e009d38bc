//! Planes: handlers that serve a device's queues without Python, or call it with requests that are parsed.

mod aligned;
pub mod blk;
mod file;
mod merge;
pub mod net;
mod null;
mod pace;
mod transfer;
mod uring;

pub use file::FileBackend;
pub use merge::Merging;
pub use null::NullBackend;
pub use uring::{io_uring_missing, UringQueue};
