//! virtio-blk requests (virtio 1.3, 5.2.6): one parser, whoever does the I/O.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use super::pace::Pace;
pub use super::transfer::Buffers;
use super::transfer::{in_pieces, transfer};
use crate::chain::{Chain, ChainError, Segment};
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
#[derive(Debug)]
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

/// Since the plane was made; `errors` counts requests that were answered with an error.
#[derive(Debug, Default)]
pub struct BlkCounters {
    pub reads: Counter,
    pub writes: Counter,
    pub flushes: Counter,
    pub discards: Counter,
    pub errors: Counter,
    pub bytes_read: Counter,
    pub bytes_written: Counter,
}

impl BlkCounters {
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("reads", self.reads.get()),
            ("writes", self.writes.get()),
            ("flushes", self.flushes.get()),
            ("discards", self.discards.get()),
            ("errors", self.errors.get()),
            ("bytes_read", self.bytes_read.get()),
            ("bytes_written", self.bytes_written.get()),
        ]
    }
}

/// What a request asks for. Offsets and lengths are bytes, whole blocks within the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Read { offset: u64, length: usize },
    Write { offset: u64, length: usize },
    Flush,
    GetId,
    Discard,
    WriteZeroes,
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
            if let Err(reason) = self.serve(&mut chain) {
                vq.state().fail(&format!("{}: {reason}", vq.name()));
                return;
            }
            if pace.answered() {
                vq.publish();
            }
        }
    }
}

impl BlkPlane {
    pub fn new(backend: Box<dyn Backend>, disk: Disk) -> Self {
        Self { backend, disk, writethrough: AtomicBool::new(false), counters: BlkCounters::default() }
    }

    /// Answer one request; an error is why the device needs a reset.
    fn serve(&self, chain: &mut Chain) -> Result<(), String> {
        let result = self.decode(chain).and_then(|op| self.execute(chain, op));
        self.answer(chain, result)
    }

    /// Give a request back with its status.
    pub fn answer(&self, chain: &mut Chain, result: Result<(), Failure>) -> Result<(), String> {
        let status = match result {
            Ok(()) => S_OK,
            Err(Failure::Refused) => S_IOERR,
            Err(Failure::Unsupported) => S_UNSUPP,
            Err(Failure::Broken(reason)) => return Err(reason),
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
        Ok(Op::Read { offset, length })
    }

    fn decode_write(&self, chain: &Chain, sector: u64) -> Result<Op, Failure> {
        let length = chain.readable_left();
        let offset = self.disk.offset(sector, length as u64)?;
        if self.disk.readonly || chain.writable_left() > STATUS_BYTES {
            return Err(Failure::Refused);
        }
        self.counters.writes.add(1);
        Ok(Op::Write { offset, length })
    }

    /// Do it, on this thread.
    pub fn execute(&self, chain: &mut Chain, op: Op) -> Result<(), Failure> {
        match op {
            Op::Read { offset, length } => self.read(chain, offset, length),
            Op::Write { offset, length } => self.write(chain, offset, length),
            Op::Flush => self.flush(),
            Op::GetId => self.get_id(chain),
            Op::Discard => self.discard(chain),
            Op::WriteZeroes => self.write_zeroes(chain),
        }
    }

    /// Read or write these buffers of a request, on this thread.
    pub fn transfer(
        &self,
        chain: &mut Chain,
        segments: &mut [Segment],
        offset: u64,
        write: bool,
    ) -> Result<(), Failure> {
        let memory = chain.memory();
        let (done, result) = transfer(segments, offset, |segments, at| {
            let buffers = Buffers { memory, segments };
            if write {
                self.backend.write(&buffers, at)
            } else {
                self.backend.read(&buffers, at)
            }
        });
        if !write {
            self.has_read(chain, done);
            return result;
        }
        self.counters.bytes_written.add(done as u64);
        result.and_then(|()| self.flush_if_writethrough())
    }

    fn read(&self, chain: &mut Chain, offset: u64, length: usize) -> Result<(), Failure> {
        let (done, result) =
            in_pieces(chain, length, offset, Chain::take_writable, |into, at| self.backend.read(into, at));
        self.has_read(chain, done);
        result
    }

    /// Count what was read into the guest's buffers.
    pub fn has_read(&self, chain: &mut Chain, bytes: usize) {
        chain.wrote(bytes as u32);
        self.counters.bytes_read.add(bytes as u64);
    }

    fn write(&self, chain: &mut Chain, offset: u64, length: usize) -> Result<(), Failure> {
        let (done, result) =
            in_pieces(chain, length, offset, Chain::take_readable, |from, at| self.backend.write(from, at));
        self.counters.bytes_written.add(done as u64);
        result?;
        self.flush_if_writethrough()
    }

    fn flush(&self) -> Result<(), Failure> {
        self.counters.flushes.add(1);
        self.backend.flush()
    }

    pub fn is_writethrough(&self) -> bool {
        self.writethrough.load(Ordering::Relaxed)
    }

    fn flush_if_writethrough(&self) -> Result<(), Failure> {
        if self.is_writethrough() {
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
        self.flush_if_writethrough()
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
