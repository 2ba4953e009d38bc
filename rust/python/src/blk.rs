//! `BlkPlane`, and the block backend that is written in Python.

use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyInt};
use pyvirtio_core::planes::blk::{self, Backend, Buffers, Disk, Failure, ID_BYTES};
use pyvirtio_core::planes::{FileBackend, Merging, NullBackend, UringQueue};
use pyvirtio_core::{Handler, VirtQueue};

use crate::buffer::{self, Views};
use crate::errors::os_error;
use crate::logging;

/// Bytes of one `discard` or `write_zeroes` call: a backend may well make that many bytes to write them.
const PIECE: u64 = 1 << 20;

/// Reads and writes that do nothing.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct NullIo;

#[pymethods]
impl NullIo {
    #[new]
    fn new() -> Self {
        Self
    }
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct BlkPlane {
    plane: Arc<blk::BlkPlane>,
    service: Service,
}

/// How the requests of a queue are served.
enum Service {
    Native,
    Merged,
    Uring(FileBackend),
    Attached,
}

impl BlkPlane {
    pub fn handler(&self, py: Python<'_>, vq: &VirtQueue) -> Arc<dyn Handler> {
        match &self.service {
            Service::Native => self.plane.clone(),
            Service::Merged => Arc::new(Merging(self.plane.clone())),
            Service::Attached => Arc::new(Attached(self.plane.clone())),
            Service::Uring(file) => match UringQueue::new(self.plane.clone(), file.clone(), vq) {
                Ok(queue) => Arc::new(queue),
                Err(error) => {
                    logging::warning(py, &format!("{}: no io_uring, served with aio=threads: {error}", vq.name()));
                    self.plane.clone()
                }
            },
        }
    }
}

const THREADS: &str = "threads";
const URING: &str = "io_uring";

/// A raw file, and how it is read and written.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct FileIo {
    file: FileBackend,
    aio: &'static str,
}

#[pymethods]
impl FileIo {
    #[new]
    #[pyo3(signature = (fd, *, align = 1, aio = THREADS))]
    fn new(fd: RawFd, align: usize, aio: &str) -> PyResult<Self> {
        let aio = match aio {
            THREADS => THREADS,
            URING => URING,
            _ => return Err(PyValueError::new_err(format!("aio={aio} is not allowed: {THREADS} or {URING}"))),
        };
        Ok(Self { file: FileBackend::new(duplicate(fd)?, align), aio })
    }

    #[getter]
    fn aio(&self) -> &str {
        self.aio
    }
}

/// None if this host gives us io_uring, else why not.
#[pyfunction]
pub fn io_uring_missing() -> Option<String> {
    pyvirtio_core::planes::io_uring_missing().map(|error| error.to_string())
}

#[pymethods]
impl BlkPlane {
    #[new]
    #[pyo3(signature = (backend, *, capacity, readonly = false, flush = true, discard = false, write_zeroes = false,
                        serial = Vec::new(), block_size = 512, max_discard_sectors = 0,
                        max_write_zeroes_sectors = 0, max_discard_segments = 1))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        backend: &Bound<'_, PyAny>,
        capacity: u64,
        readonly: bool,
        flush: bool,
        discard: bool,
        write_zeroes: bool,
        serial: Vec<u8>,
        block_size: u32,
        max_discard_sectors: u32,
        max_write_zeroes_sectors: u32,
        max_discard_segments: usize,
    ) -> PyResult<Self> {
        if block_size == 0 {
            return Err(PyValueError::new_err("block_size is 0"));
        }
        let disk = Disk {
            capacity: capacity.into(),
            block_size: block_size.into(),
            readonly,
            flush,
            discard,
            write_zeroes,
            id: id(&serial)?,
            max_discard_sectors,
            max_write_zeroes_sectors,
            max_ranges: max_discard_segments,
        };
        let (backend, service): (Box<dyn Backend>, Service) = if let Ok(fd) = backend.extract::<RawFd>() {
            (Box::new(FileBackend::new(duplicate(fd)?, 1)), Service::Merged)
        } else if let Ok(io) = backend.cast::<FileIo>() {
            let FileIo { file, aio } = io.get();
            (Box::new(file.clone()), if *aio == URING { Service::Uring(file.clone()) } else { Service::Merged })
        } else if backend.cast::<NullIo>().is_ok() {
            (Box::new(NullBackend), Service::Native)
        } else {
            (Box::new(PythonBackend::new(backend)?), Service::Attached)
        };
        Ok(Self { plane: Arc::new(blk::BlkPlane::new(backend, disk)), service })
    }

    #[getter]
    fn writethrough(&self) -> bool {
        self.plane.writethrough.load(Ordering::Relaxed)
    }

    #[getter]
    fn capacity(&self) -> u64 {
        self.plane.disk.capacity.load(Ordering::Relaxed)
    }

    #[setter]
    fn set_capacity(&self, capacity: u64) {
        self.plane.disk.capacity.store(capacity, Ordering::Relaxed);
    }

    #[setter]
    fn set_writethrough(&self, writethrough: bool) {
        self.plane.writethrough.store(writethrough, Ordering::Relaxed);
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.plane.counters.named().into_py_dict(py)
    }
}

fn id(serial: &[u8]) -> PyResult<[u8; ID_BYTES]> {
    let mut id = [0; ID_BYTES];
    let room = id
        .get_mut(..serial.len())
        .ok_or_else(|| PyValueError::new_err(format!("serial has {} bytes, at most {ID_BYTES}", serial.len())))?;
    room.copy_from_slice(serial);
    Ok(id)
}

pub fn duplicate(fd: RawFd) -> PyResult<File> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("no file descriptor: {fd}")));
    }
    // SAFETY: borrowed only to be duplicated, and a closed one is refused by the kernel.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map(File::from).map_err(os_error)
}

/// Attaches once for all requests of a pass, not for each.
struct Attached(Arc<blk::BlkPlane>);

impl Handler for Attached {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        Python::attach(|py| buffer::while_lent(py, || self.0.handle(vq)));
    }
}

/// Methods of a `BlockBackend`, as far as its class defines them.
struct PythonBackend {
    read: Transfer,
    write: Transfer,
    flush: Option<Py<PyAny>>,
    discard: Option<Py<PyAny>>,
    write_zeroes: Option<Py<PyAny>>,
}

/// How a backend takes data.
enum Transfer {
    /// In the guest's own buffers: preadv, pwritev.
    InPlace(Py<PyAny>),
    /// As bytes: pread, pwrite.
    Copied(Py<PyAny>),
    None,
}

impl Transfer {
    fn of(backend: &Bound<'_, PyAny>, in_place: &str, copied: &str) -> PyResult<Self> {
        if let Some(method) = backend.getattr_opt(in_place)? {
            return Ok(Self::InPlace(method.unbind()));
        }
        Ok(backend.getattr_opt(copied)?.map_or(Self::None, |method| Self::Copied(method.unbind())))
    }
}

impl PythonBackend {
    fn new(backend: &Bound<'_, PyAny>) -> PyResult<Self> {
        let method = |name| backend.getattr_opt(name).map(|method| method.map(Bound::unbind));
        Ok(Self {
            read: Transfer::of(backend, "preadv", "pread")?,
            write: Transfer::of(backend, "pwritev", "pwrite")?,
            flush: method("flush")?,
            discard: method("discard")?,
            write_zeroes: method("write_zeroes")?,
        })
    }
}

/// Do something with Python. Attaching, even where it is done, costs more than a small request.
fn attached<T>(work: impl FnOnce(Python<'_>) -> T) -> T {
    // SAFETY: a plane with this backend has no handler but `Attached`, within whose `handle` all of this happens.
    work(unsafe { Python::assume_attached() })
}

impl Backend for PythonBackend {
    fn read(&self, into: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        attached(|py| {
            match &self.read {
                Transfer::InPlace(method) => in_place(py, method, into, offset, true),
                Transfer::Copied(method) => {
                    let length = PyInt::new(py, into.total());
                    call(method.bind(py), &length, offset).and_then(|data| fill(into, &data))
                }
                Transfer::None => Err(undefined("pread")),
            }
            .map_err(|error| failure(py, &error))
        })
    }

    fn write(&self, from: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        attached(|py| {
            match &self.write {
                Transfer::InPlace(method) => in_place(py, method, from, offset, false),
                Transfer::Copied(method) => PyBytes::new_with(py, from.total(), |out| {
                    from.gather(out);
                    Ok(())
                })
                .and_then(|data| call(method.bind(py), &data, offset))
                .and_then(|done| transferred(&done, from)),
                Transfer::None => Err(undefined("pwrite")),
            }
            .map_err(|error| failure(py, &error))
        })
    }

    /// A backend without a flush has nothing that is not durable already.
    fn flush(&self) -> Result<(), Failure> {
        let Some(method) = &self.flush else { return Ok(()) };
        attached(|py| method.call0(py).map(drop).map_err(|error| failure(py, &error)))
    }

    fn discard(&self, length: u64, offset: u64) -> Result<(), Failure> {
        in_pieces(self.discard.as_ref(), length, offset)
    }

    fn write_zeroes(&self, length: u64, offset: u64, _unmap: bool) -> Result<(), Failure> {
        in_pieces(self.write_zeroes.as_ref(), length, offset)
    }
}

fn in_pieces(method: Option<&Py<PyAny>>, length: u64, offset: u64) -> Result<(), Failure> {
    let method = method.ok_or(Failure::Unsupported)?;
    attached(|py| {
        let mut done = 0;
        while done < length {
            let piece = PIECE.min(length - done);
            method.call1(py, (piece, offset + done)).map_err(|error| failure(py, &error))?;
            done += piece;
        }
        Ok(())
    })
}

fn undefined(method: &str) -> PyErr {
    pyo3::exceptions::PyNotImplementedError::new_err(format!("the backend defines no {method}"))
}

/// The host's fault fails the request; anything else is the backend's own.
fn failure(py: Python<'_>, error: &PyErr) -> Failure {
    if error.is_instance_of::<PyOSError>(py) {
        return Failure::Refused;
    }
    logging::exception(py, "exception in a block backend", error);
    let name = error.get_type(py).qualname().map_or_else(|_| "an exception".into(), |name| name.to_string());
    Failure::Broken(format!("the backend raised {name}: {}", error.value(py)))
}

fn fill(into: &Buffers<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
    let wanted = into.total();
    crate::bytes::with_bytes(data, |data| match data.len() {
        length if length == wanted => Ok(into.fill(data)),
        length => Err(not_all(&format!("pread returned {length} bytes"), length > wanted, wanted)),
    })?
}

/// What a method says it did: the number of bytes, or None for all.
fn transferred(done: &Bound<'_, PyAny>, buffers: &Buffers<'_>) -> PyResult<usize> {
    let wanted = buffers.total();
    if done.is_none() {
        return Ok(wanted);
    }
    match done.extract::<usize>() {
        Ok(length) if length == wanted => Ok(wanted),
        Ok(length) if length < wanted => Err(not_all(&format!("it did {length} bytes"), false, wanted)),
        _ => Err(not_all(&format!("it returned {done}"), true, wanted)),
    }
}

/// Less than was asked for is the host's fault, anything else a defect of the backend.
fn not_all(what: &str, defect: bool, wanted: usize) -> PyErr {
    let message = format!("{what} where {wanted} were asked for");
    if defect {
        PyValueError::new_err(message)
    } else {
        PyOSError::new_err(message)
    }
}

fn in_place(py: Python<'_>, method: &Py<PyAny>, buffers: &Buffers<'_>, offset: u64, writable: bool) -> PyResult<usize> {
    let views = Views::of(py, buffers.memory, buffers.segments, writable)?;
    let list = views.list(py)?;
    let done = call(method.bind(py), &list, offset);
    drop(list);
    views.take_back(py);
    transferred(&done?, buffers)
}

/// Call with two arguments, without the tuple that `call1` makes for them.
fn call<'py>(method: &Bound<'py, PyAny>, what: &Bound<'py, PyAny>, offset: u64) -> PyResult<Bound<'py, PyAny>> {
    let py = method.py();
    let offset = PyInt::new(py, offset);
    // SAFETY: objects that live until the call is over, and the end of their list; what comes back is ours.
    unsafe {
        let done = ffi::PyObject_CallFunctionObjArgs(
            method.as_ptr(),
            what.as_ptr(),
            offset.as_ptr(),
            std::ptr::null_mut::<ffi::PyObject>(),
        );
        Bound::from_owned_ptr_or_err(py, done)
    }
}
