//! Guest memory as memoryviews: the buffers of a request, in place.

use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyMemoryView};
use pyvirtio_core::chain::Segment;
use pyvirtio_core::memory::GuestMemory;
use smallvec::SmallVec;

/// What a method in Python is lent: a view of each buffer that is not empty.
pub struct Views(SmallVec<[Py<PyMemoryView>; 4]>);

impl Views {
    pub fn of(py: Python<'_>, memory: &GuestMemory, segments: &[Segment], writable: bool) -> PyResult<Self> {
        let exporter = exporter(py, memory)?;
        let full = segments.iter().filter(|segment| segment.iov_len > 0);
        full.map(|segment| exporter.get().view(&exporter, segment, writable)).collect::<PyResult<_>>().map(Self)
    }

    /// A list of them; whoever gets it may change it.
    pub fn list<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.0.iter().map(|view| view.bind(py)))
    }

    /// Make them invalid. Drop their list first: what nobody else refers to needs no call to end.
    pub fn take_back(self, py: Python<'_>) {
        for view in self.0 {
            let view = view.into_bound(py);
            if references(&view) > 1 {
                // Refused while somebody has a view of the view; the exporter keeps the memory mapped then.
                let _ = view.call_method0(intern!(py, "release"));
            }
        }
    }

    /// Take them back when the handler that runs returns.
    pub fn take_back_later(self) {
        SCOPE.with_borrow_mut(|scope| scope.lent.push(self));
    }
}

/// What the handler that runs on a thread has needed so far.
#[derive(Default)]
struct Scope {
    exporter: Option<Py<GuestBuffer>>,
    lent: Vec<Views>,
}

thread_local! {
    static SCOPE: RefCell<Scope> = RefCell::default();
}

/// Call a handler, and take back what it was lent.
pub fn while_lent<T>(py: Python<'_>, call: impl FnOnce() -> T) -> T {
    let outer = SCOPE.take();
    let result = call();
    for views in SCOPE.replace(outer).lent {
        views.take_back(py);
    }
    result
}

/// One for all the views of a handler's call, unless the memory changes meanwhile. `SCOPE` is not borrowed while Python runs.
fn exporter<'py>(py: Python<'py>, memory: &GuestMemory) -> PyResult<Bound<'py, GuestBuffer>> {
    let known = SCOPE.with_borrow(|scope| scope.exporter.as_ref().map(|known| known.clone_ref(py).into_bound(py)));
    if let Some(known) = known.filter(|known| known.get().memory.is(memory)) {
        return Ok(known);
    }
    let made = Bound::new(py, GuestBuffer::new(memory.clone()))?;
    let old = SCOPE.with_borrow_mut(|scope| scope.exporter.replace(made.clone().unbind()));
    drop(old);
    Ok(made)
}

/// Guest memory that stays mapped as long as Python refers to a piece of it. Which piece the next view shows is set
/// before each, by the only thread that makes views with it.
#[pyclass(frozen)]
struct GuestBuffer {
    memory: GuestMemory,
    start: AtomicUsize,
    length: AtomicUsize,
    writable: AtomicBool,
}

impl GuestBuffer {
    fn new(memory: GuestMemory) -> Self {
        Self { memory, start: AtomicUsize::new(0), length: AtomicUsize::new(0), writable: AtomicBool::new(false) }
    }

    fn view(&self, this: &Bound<'_, Self>, segment: &Segment, writable: bool) -> PyResult<Py<PyMemoryView>> {
        self.start.store(segment.iov_base as usize, Ordering::Relaxed);
        self.length.store(segment.iov_len, Ordering::Relaxed);
        self.writable.store(writable, Ordering::Relaxed);
        PyMemoryView::from(this.as_any()).map(Bound::unbind)
    }
}

#[pymethods]
impl GuestBuffer {
    /// # Safety
    /// Called by the interpreter, with a `Py_buffer` to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, buffer: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let start = this.start.load(Ordering::Relaxed) as *mut std::ffi::c_void;
        let length = this.length.load(Ordering::Relaxed) as ffi::Py_ssize_t;
        let readonly = c_int::from(!this.writable.load(Ordering::Relaxed));
        // SAFETY: the piece is mapped as long as `slf`, to which the buffer keeps a reference; its start and its length
        // belong together, because both change while the interpreter is held.
        let filled = unsafe { ffi::PyBuffer_FillInfo(buffer, slf.as_ptr(), start, length, readonly, flags) };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// How many references there are to it, ours among them.
fn references(view: &Bound<'_, PyMemoryView>) -> isize {
    // SAFETY: `view` is a live object, and the interpreter is held.
    unsafe { ffi::Py_REFCNT(view.as_ptr()) }
}
