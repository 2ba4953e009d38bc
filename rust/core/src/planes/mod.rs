//! Planes: handlers that serve a device's queues without Python, or call it with requests that are parsed.

pub mod blk;
mod file;
mod null;

pub use file::FileBackend;
pub use null::NullBackend;
