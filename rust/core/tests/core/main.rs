//! The core against a driver that writes every ring word by hand.

mod bench;
mod chains;
mod driver;
mod endless;
mod garbage;
mod hostile;
mod inflight;
mod inflight_packed;
mod interrupts;
mod killed;
mod memory;
mod merge;
mod notifications;
mod oracle;
mod packed;
mod packed_driver;
mod packed_hostile;
mod packed_model;
mod races;
mod service;
mod unpop;
mod watches;
