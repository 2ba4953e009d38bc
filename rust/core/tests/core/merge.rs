//! Requests that are done together come out as if each had been done alone.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use pyvirtio_core::planes::blk::{Backend, BlkPlane, Buffers, Disk, Failure, ID_BYTES};
use pyvirtio_core::planes::Merging;

use crate::driver::{Driver, BORDER, BUFFERS, NEXT, USED, WRITE};

const SECTOR: usize = 512;
const SECTORS: usize = 32;
const REQUESTS: u16 = 64;
/// Of a request: its header, then its status.
const CONTROL: u64 = 32;
const STATUS: u64 = 16;
/// Room for the data of each.
const ROOM: u64 = 4 * SECTOR as u64;

/// A disk with bad sectors, which transfers at most `step` bytes at a time and counts what is written where.
struct Patchy {
    content: Mutex<Vec<u8>>,
    writes: Mutex<Vec<u32>>,
    calls: Mutex<u32>,
    bad: HashSet<usize>,
    step: usize,
}

impl Patchy {
    fn new(bad: HashSet<usize>, step: usize) -> Self {
        let content = Mutex::new((0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8).collect());
        Self { content, writes: Mutex::new(vec![0; SECTORS * SECTOR]), calls: Mutex::new(0), bad, step }
    }

    /// How much can be done of so many bytes from there; as the kernel, it fails where it can do nothing at all.
    fn possible(&self, offset: usize, length: usize) -> Result<usize, Failure> {
        *self.calls.lock().unwrap() += 1;
        let good = (offset..offset + length.min(self.step)).take_while(|at| !self.bad.contains(&(at / SECTOR))).count();
        if good == 0 {
            return Err(Failure::Refused);
        }
        Ok(good)
    }

    fn write(&self, data: &[u8], offset: usize) {
        self.content.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        self.writes.lock().unwrap()[offset..offset + data.len()].iter_mut().for_each(|count| *count += 1);
    }
}

struct Shared(Arc<Patchy>);

impl Backend for Shared {
    fn read(&self, into: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        let offset = offset as usize;
        let n = self.0.possible(offset, into.total())?;
        Ok(into.fill(&self.0.content.lock().unwrap()[offset..offset + n]))
    }

    fn write(&self, from: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        let n = self.0.possible(offset as usize, from.total())?;
        let mut data = vec![0; from.total()];
        from.gather(&mut data);
        self.0.write(&data[..n], offset as usize);
        Ok(n)
    }

    fn flush(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Failure> {
        Ok(())
    }
}

fn plane(disk: &Arc<Patchy>) -> Arc<BlkPlane> {
    let told = Disk {
        capacity: ((SECTORS * SECTOR) as u64).into(),
        block_size: SECTOR as u64,
        readonly: false,
        flush: true,
        discard: false,
        write_zeroes: false,
        id: [0; ID_BYTES],
        max_discard_sectors: 0,
        max_write_zeroes_sectors: 0,
        max_ranges: 1,
    };
    Arc::new(BlkPlane::new(Box::new(Shared(disk.clone())), told))
}

#[derive(Debug, Clone)]
struct Request {
    write: bool,
    sector: usize,
    sectors: usize,
}

impl Request {
    fn data(&self, number: usize) -> Vec<u8> {
        vec![0x80 | number as u8; self.sectors * SECTOR]
    }

    /// Do it alone; its status, and how much of it was done.
    fn alone(&self, disk: &Patchy, number: usize) -> (u8, Vec<u8>) {
        let range = self.sector..self.sector + self.sectors;
        let good = range.clone().take_while(|sector| !disk.bad.contains(sector)).count();
        let (start, length) = (self.sector * SECTOR, good * SECTOR);
        let status = u8::from(good < self.sectors);
        if self.write {
            disk.write(&self.data(number)[..length], start);
            return (status, Vec::new());
        }
        (status, disk.content.lock().unwrap()[start..start + length].to_vec())
    }
}

fn add(driver: &mut Driver, number: usize, request: &Request) {
    let (head, slot) = (3 * number as u16, number as u64);
    let (control, data) = (BUFFERS + CONTROL * slot, BORDER + ROOM * slot);
    let header = u128::from(request.write) | (request.sector as u128) << 64;
    driver.memory.write(control, &header.to_le_bytes()).unwrap();
    driver.memory.write(control + STATUS, &[0xff]).unwrap();
    if request.write {
        driver.memory.write(data, &request.data(number)).unwrap();
    }
    driver.desc(head, control, 16, NEXT, head + 1);
    let length = (request.sectors * SECTOR) as u32;
    driver.desc(head + 1, data, length, if request.write { NEXT } else { NEXT | WRITE }, head + 2);
    driver.desc(head + 2, control + STATUS, 1, WRITE, 0);
    driver.make_available(head);
}

/// All at once to a device; per request its status and what it read.
fn served(disk: &Arc<Patchy>, requests: &[Request]) -> Vec<(u8, Vec<u8>)> {
    // Other places than usual: the descriptors of 64 requests take more room.
    let mut driver = Driver::with(|config| (config.size, config.used) = (256, USED + 0x1000));
    driver.vq.start(driver.memory.clone(), &driver.config, Arc::new(Merging(plane(disk)))).unwrap();
    for (number, request) in requests.iter().enumerate() {
        add(&mut driver, number, request);
    }
    driver.vq.notify();
    assert_eq!(driver.broken(), "");
    (0..requests.len()).map(|number| outcome(&driver, number, &requests[number])).collect()
}

fn outcome(driver: &Driver, number: usize, request: &Request) -> (u8, Vec<u8>) {
    let slot = number as u64;
    let mut status = [0];
    driver.memory.read(BUFFERS + CONTROL * slot + STATUS, &mut status).unwrap();
    let entry = driver.config.used + 4 + 8 * slot;
    let word = |at| driver.memory.atomic32(at).unwrap().load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(word(entry), 3 * number as u32, "answered in order");
    let mut read = vec![0; if request.write { 0 } else { word(entry + 4) as usize - 1 }];
    driver.memory.read(BORDER + ROOM * slot, &mut read).unwrap();
    (status[0], read)
}

/// Half of them go on where the one before ended.
fn requests() -> impl Strategy<Value = Vec<Request>> {
    let one = (any::<bool>(), 0..SECTORS, 0..4usize, any::<bool>());
    prop::collection::vec(one, 1..usize::from(REQUESTS)).prop_map(|all| {
        let (mut next, mut kind) = (0, false);
        let follow = |(write, sector, sectors, follows): (bool, usize, usize, bool)| {
            let (write, sector) = if follows { (kind, next) } else { (write, sector) };
            let sector = sector.min(SECTORS - sectors);
            (kind, next) = (write, sector + sectors);
            Request { write, sector, sectors }
        };
        all.into_iter().map(follow).collect()
    })
}

proptest! {
    #[test]
    fn together_is_as_one_after_the_other(
        requests in requests(),
        bad in prop::collection::hash_set(0..SECTORS, 0..4),
        step in prop_oneof![Just(usize::MAX), 1..3 * SECTOR],
    ) {
        let (disk, model) = (Arc::new(Patchy::new(bad.clone(), step)), Patchy::new(bad, step));
        let found = served(&disk, &requests);
        let expected: Vec<_> = requests.iter().enumerate().map(|(number, one)| one.alone(&model, number)).collect();
        prop_assert_eq!(found, expected);
        prop_assert_eq!(&*disk.content.lock().unwrap(), &*model.content.lock().unwrap());
        prop_assert_eq!(&*disk.writes.lock().unwrap(), &*model.writes.lock().unwrap());
    }
}

#[test]
fn neighbours_take_one_call() {
    let disk = Arc::new(Patchy::new(HashSet::new(), usize::MAX));
    let requests: Vec<_> = (0..8).map(|sector| Request { write: sector >= 4, sector, sectors: 1 }).collect();
    served(&disk, &requests);
    assert_eq!(*disk.calls.lock().unwrap(), 2);
}
