use std::fs::File;
use std::os::fd::AsRawFd;

use pyvirtio_core::GuestMemory;

use crate::driver::{ram, BORDER, END};

#[test]
fn an_access_crosses_from_a_region_into_an_adjacent_one() {
    let memory = ram();
    memory.write(BORDER - 3, b"abcdef").unwrap();
    let mut out = [0; 6];
    memory.read(BORDER - 3, &mut out).unwrap();
    assert_eq!(&out, b"abcdef");
}

#[test]
fn an_access_outside_the_regions_is_refused_and_changes_nothing() {
    let memory = ram();
    for (address, length) in [(END - 1, 2), (END, 1), (u64::MAX, 1), (u64::MAX - 1, 4), (1 << 40, 16)] {
        let data = vec![0xff; length];
        let error = memory.write(address, &data).unwrap_err();
        assert_eq!(error.0, format!("{length} bytes at {address:#x} are not guest memory"));
    }
    let mut last = [1];
    memory.read(END - 1, &mut last).unwrap();
    assert_eq!(last, [0]);
}

#[test]
fn a_region_at_the_end_of_the_address_space_works() {
    let memory = GuestMemory::allocate(&[(u64::MAX - 0xfff, 0x1000)]);
    if let Ok(memory) = memory {
        memory.write(u64::MAX, b"x").unwrap();
        assert!(memory.write(u64::MAX, b"xy").is_err());
    }
}

#[test]
fn nothing_at_all_may_be_read_anywhere() {
    ram().read(1 << 50, &mut []).unwrap();
}

#[test]
fn an_unaligned_word_is_refused() {
    let error = ram().atomic16(0x1001).unwrap_err();
    assert_eq!(error.0, "address 0x1001 is not a multiple of 2");
}

#[test]
fn overlapping_regions_are_refused() {
    let error = GuestMemory::allocate(&[(0, 0x2000), (0x1000, 0x1000)]).err().unwrap();
    assert_eq!(error.to_string(), "memory regions at 0x0 and 0x1000 overlap");
}

#[test]
fn a_region_past_the_end_of_its_file_is_refused() {
    let file = File::open("/proc/self/exe").unwrap();
    assert!(GuestMemory::new(&[(0, 1 << 40, file.as_raw_fd(), 0)]).is_err());
}

#[test]
fn a_closed_fd_is_refused() {
    let error = GuestMemory::new(&[(0, 0x1000, -1, 0)]).err().unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn a_region_that_stays_is_not_mapped_again() {
    let regions =
        |memory: &GuestMemory| memory.regions().map(|r| (r.address, r.size, r.fd, r.offset)).collect::<Vec<_>>();
    let hosts = |memory: &GuestMemory| memory.regions().map(|region| region.host).collect::<Vec<_>>();
    let both = GuestMemory::allocate(&[(0, 0x1000), (0x1000, 0x1000)]).unwrap();
    let one = both.remap(&regions(&both)[1..]).unwrap();
    assert_eq!(hosts(&one), hosts(&both)[1..]);
    drop(both);
    one.write(0x1000, b"x").unwrap();
    assert!(one.write(0, b"x").is_err());
}

#[test]
fn a_region_that_changes_is_mapped_anew() {
    let memory = GuestMemory::allocate(&[(0, 0x2000)]).unwrap();
    let old = memory.regions().next().unwrap();
    let other = GuestMemory::allocate(&[(0, 0x2000)]).unwrap();
    let new_fd = other.regions().next().unwrap().fd;
    for region in
        [(0x2000, 0x2000, old.fd, 0), (0, 0x1000, old.fd, 0), (0, 0x1000, old.fd, 0x1000), (0, 0x2000, new_fd, 0)]
    {
        let new = memory.remap(&[region]).unwrap();
        assert_ne!(new.regions().next().unwrap().host, old.host);
        memory.write(0, b"old").unwrap();
    }
}

#[test]
fn discarded_pages_read_as_zeroes_and_their_neighbours_stay() {
    let memory = GuestMemory::allocate(&[(0, 0x4000), (0x4000, 0x4000), (1 << 32, 0x2000)]).unwrap();
    memory.write(0, &[7; 0x8000]).unwrap();
    memory.discard(0x2001, 0x3fff).unwrap();
    let mut byte = [0];
    for (page, kept) in [true, true, true, false, false, false, true, true].into_iter().enumerate() {
        memory.read(page as u64 * 0x1000, &mut byte).unwrap();
        assert_eq!(byte[0], if kept { 7 } else { 0 }, "page {page}");
    }
}

#[test]
fn discarding_what_is_no_memory_does_nothing() {
    let memory = ram();
    memory.discard(u64::MAX - 100, u64::MAX).unwrap();
    memory.discard(1 << 40, 1 << 40).unwrap();
    memory.discard(5, 100).unwrap();
}
