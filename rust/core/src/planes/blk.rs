//! virtio-blk requests (virtio 1.3, 5.2.6): one parser, whoever does the I/O.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use super::pace::Pace;
use super::transfer::in_pieces;
pub use super::transfer::Buffers;
use crate::chain::{Chain, ChainError};
use crate::counters::Counter;
use crate::queue::{Handler, VirtQueue};

const SECTOR: u64 = 512;
pub const ID_BYTES: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const FLAG_UNMAP: u32 = 1;
const STATUS_BYTES: usize = 1;
const RANGE_BYTES: usize = 16;

/// Why a request was not done.
#[derive(Debug, Clone)]
pub enum Failure {
    /// The host could not do it, or the driver asked for something it must not: VIRTIO_BLK_S_IOERR.
    Refused,
    /// Not a request this disk was said to understand: VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// The backend is wrong, not the host: the device breaks, with this reason.
    Broken(String),
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Refused
    }
}

/// The device needs a reset, and was told why.
pub struct Broken;

/// A stale chain gets no answer at all, so what it says does not matter.
impl From<ChainError> for Failure {
    fn from(_: ChainError) -> Self {
        Self::Refused
    }
}

/// Does the I/O. Offsets and lengths are bytes, whole blocks within the capacity. Any number of threads at once.
pub trait Backend: Send + Sync {
    /// Fill the buffers from `offset`; may do less, and returns how much. 0 is an error.
    fn read(&self, into: &Buffers<'_>, offset: u64) -> Result<usize, Failure>;
    fn write(&self, from: &Buffers<'_>, offset: u64) -> Result<usize, Failure>;
    fn flush(&self) -> Result<(), Failure>;
    fn discard(&self, length: u64, offset: u64) -> Result<(), Failure>;
    /// `unmap`: the blocks may become holes.
    fn write_zeroes(&self, length: u64, offset: u64, unmap: bool) -> Result<(), Failure>;
}

/// What the driver was told about the disk.
#[derive(Debug)]
pub struct Disk {
    /// Bytes; may change while requests are served.
    pub capacity: AtomicU64,
    pub block_size: u64,
    pub readonly: bool,
    pub flush: bool,
    pub discard: bool,
    pub write_zeroes: bool,
    pub id: [u8; ID_BYTES],
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    /// Ranges in one discard or write-zeroes request.
    pub max_ranges: usize,
}

impl Disk {
    /// Byte offset of a request, if it is whole blocks within the disk.
    fn offset(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        let start = sector.checked_mul(SECTOR).ok_or(Failure::Refused)?;
        let end = start.checked_add(length).ok_or(Failure::Refused)?;
        if end > self.capacity.load(Ordering::Relaxed) || start % self.block_size != 0 || length % self.block_size != 0
        {
            return Err(Failure::Refused);
        }
        Ok(start)
    }
}

/// Since the plane was made; `errors` counts requests that were answered with an error, `merged` those that were done
/// together with the one before.
#[derive(Debug, Default)]
pub struct BlkCounters {
    pub reads: Counter,
    pub writes: Counter,
    pub flushes: Counter,
    pub discards: Counter,
    pub merged: Counter,
    pub errors: Counter,
    pub bytes_read: Counter,
    pub bytes_written: Counter,
}

impl BlkCounters {
    pub fn named(&self) -> [(&'static str, u64); 8] {
        [
            ("reads", self.reads.get()),
            ("writes", self.writes.get()),
            ("flushes", self.flushes.get()),
            ("discards", self.discards.get()),
            ("merged", self.merged.get()),
            ("errors", self.errors.get()),
            ("bytes_read", self.bytes_read.get()),
            ("bytes_written", self.bytes_written.get()),
        ]
    }
}

/// What a request asks for. Offsets and lengths are bytes, whole blocks within the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Transfer(Stretch),
    Flush,
    GetId,
    Discard,
    WriteZeroes,
}

/// What a read or a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    pub write: bool,
    pub offset: u64,
    pub length: usize,
}

/// Serves the request queues of a disk, any number of them.
pub struct BlkPlane {
    backend: Box<dyn Backend>,
    pub disk: Disk,
    /// Flush after every write.
    pub writethrough: AtomicBool,
    pub counters: BlkCounters,
}

impl Handler for BlkPlane {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        let mut pace = Pace::new();
        while let Some(mut chain) = vq.pop() {
            let op = self.decode(&mut chain);
            if self.serve(&mut chain, op).is_err() {
                return;
            }
            if pace.answered(1) {
                vq.publish();
            }
        }
    }
}

impl BlkPlane {
    pub fn new(backend: Box<dyn Backend>, disk: Disk) -> Self {
        Self { backend, disk, writethrough: AtomicBool::new(false), counters: BlkCounters::default() }
    }

    /// Do a request on this thread, and answer it.
    pub fn serve(&self, chain: &mut Chain, op: Result<Op, Failure>) -> Result<(), Broken> {
        let result = op.and_then(|op| self.execute(chain, op));
        self.answer(chain, result)
    }

    /// Give a request back with its status.
    pub fn answer(&self, chain: &mut Chain, result: Result<(), Failure>) -> Result<(), Broken> {
        let status = match result {
            Ok(()) => S_OK,
            Err(Failure::Refused) => S_IOERR,
            Err(Failure::Unsupported) => S_UNSUPP,
            Err(Failure::Broken(reason)) => {
                // Now: the chain will be dropped, which is a reason as well.
                chain.vq().state().fail(&format!("{}: {reason}", chain.vq().name()));
                return Err(Broken);
            }
        };
        if status != S_OK {
            self.counters.errors.add(1);
        }
        chain.skip_writable(chain.writable_left() - STATUS_BYTES);
        // They fail only for a stale chain, and then nobody waits for the answer.
        let _ = chain.write(&[status]);
        let _ = chain.complete();
        Ok(())
    }

    /// What a request asks for, checked against the disk.
    pub fn decode(&self, chain: &mut Chain) -> Result<Op, Failure> {
        if chain.writable_left() < STATUS_BYTES {
            return Err(Failure::Broken("a request without a writable status byte".into()));
        }
        let mut header = [0; 16];
        if chain.read(&mut header)? < header.len() {
            return Err(Failure::Refused);
        }
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        match kind {
            T_IN => self.decode_read(chain, sector),
            T_OUT => self.decode_write(chain, sector),
            T_FLUSH if self.disk.flush => Ok(Op::Flush),
            T_GET_ID => Ok(Op::GetId),
            T_DISCARD if self.disk.discard => Ok(Op::Discard),
            T_WRITE_ZEROES if self.disk.write_zeroes => Ok(Op::WriteZeroes),
            _ => Err(Failure::Unsupported),
        }
    }

    fn decode_read(&self, chain: &Chain, sector: u64) -> Result<Op, Failure> {
        let length = chain.writable_left() - STATUS_BYTES;
        let offset = self.disk.offset(sector, length as u64)?;
        if chain.readable_left() > 0 {
            return Err(Failure::Refused);
        }
        self.counters.reads.add(1);
        Ok(Op::Transfer(Stretch { write: false, offset, length }))
    }

    fn decode_write(&self, chain: &Chain, sector: u64) -> Result<Op, Failure> {
        let length = chain.readable_left();
        let offset = self.disk.offset(sector, length as u64)?;
        if self.disk.readonly || chain.writable_left() > STATUS_BYTES {
            return Err(Failure::Refused);
        }
        self.counters.writes.add(1);
        Ok(Op::Transfer(Stretch { write: true, offset, length }))
    }

    fn execute(&self, chain: &mut Chain, op: Op) -> Result<(), Failure> {
        match op {
            Op::Transfer(stretch) => self.transfer(chain, stretch),
            Op::Flush => self.flush(),
            Op::GetId => self.get_id(chain),
            Op::Discard => self.discard(chain),
            Op::WriteZeroes => self.write_zeroes(chain),
        }
    }

    fn transfer(&self, chain: &mut Chain, stretch: Stretch) -> Result<(), Failure> {
        let Stretch { write, offset, length } = stretch;
        let take = if write { Chain::take_readable } else { Chain::take_writable };
        let (done, result) = in_pieces(chain, length, offset, take, |buffers, at| self.step(write, buffers, at));
        self.transferred(chain, write, done);
        result.and_then(|()| self.flush_after(write))
    }

    /// Let the backend read or write, as much as it likes.
    pub fn step(&self, write: bool, buffers: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        if write {
            self.backend.write(buffers, offset)
        } else {
            self.backend.read(buffers, offset)
        }
    }

    /// Count what was read into the driver's buffers, or written from them.
    pub fn transferred(&self, chain: &mut Chain, write: bool, bytes: usize) {
        if write {
            self.counters.bytes_written.add(bytes as u64);
        } else {
            chain.wrote(bytes as u32);
            self.counters.bytes_read.add(bytes as u64);
        }
    }

    fn flush(&self) -> Result<(), Failure> {
        self.counters.flushes.add(1);
        self.backend.flush()
    }

    pub fn is_writethrough(&self) -> bool {
        self.writethrough.load(Ordering::Relaxed)
    }

    /// What a transfer that went well has to be followed by.
    pub fn flush_after(&self, write: bool) -> Result<(), Failure> {
        if write && self.is_writethrough() {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn get_id(&self, chain: &mut Chain) -> Result<(), Failure> {
        if chain.readable_left() > 0 {
            return Err(Failure::Refused);
        }
        let room = (chain.writable_left() - STATUS_BYTES).min(ID_BYTES);
        chain.write(&self.disk.id[..room])?;
        Ok(())
    }

    fn discard(&self, chain: &mut Chain) -> Result<(), Failure> {
        let ranges = self.ranges(chain, self.disk.max_discard_sectors, 0)?;
        self.counters.discards.add(1);
        ranges.iter().try_for_each(|range| self.backend.discard(range.length, range.offset))
    }

    fn write_zeroes(&self, chain: &mut Chain) -> Result<(), Failure> {
        let ranges = self.ranges(chain, self.disk.max_write_zeroes_sectors, FLAG_UNMAP)?;
        self.counters.writes.add(1);
        for range in &ranges {
            self.backend.write_zeroes(range.length, range.offset, range.flags & FLAG_UNMAP != 0)?;
            self.counters.bytes_written.add(range.length);
        }
        self.flush_after(true)
    }

    /// The ranges of a discard or write-zeroes request, all of them checked; empty ones are left out.
    fn ranges(&self, chain: &mut Chain, max_sectors: u32, known_flags: u32) -> Result<Vec<Range>, Failure> {
        let bytes = chain.readable_left();
        let wrong_size = bytes == 0 || bytes % RANGE_BYTES != 0 || bytes / RANGE_BYTES > self.disk.max_ranges;
        if self.disk.readonly || wrong_size || chain.writable_left() > STATUS_BYTES {
            return Err(Failure::Refused);
        }
        let mut ranges = Vec::with_capacity(bytes / RANGE_BYTES);
        for _ in 0..bytes / RANGE_BYTES {
            let mut raw = [0; RANGE_BYTES];
            chain.read(&mut raw)?;
            ranges.extend(self.range(u128::from_le_bytes(raw), max_sectors, known_flags)?);
        }
        Ok(ranges)
    }

    fn range(&self, raw: u128, max_sectors: u32, known_flags: u32) -> Result<Option<Range>, Failure> {
        let (sector, sectors, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
        if flags & !known_flags != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Failure::Refused);
        }
        let length = u64::from(sectors) * SECTOR;
        let offset = self.disk.offset(sector, length)?;
        Ok((length > 0).then_some(Range { offset, length, flags }))
    }
}

struct Range {
    offset: u64,
    length: u64,
    flags: u32,
}
