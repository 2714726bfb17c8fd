//! The Linux/x86 boot protocol's `boot_params` (Linux `Documentation/arch/x86/boot.rst`, `zero-page.rst`).

use super::bytes::put;
use super::layout::{COMMAND_LINE, COMMAND_LINE_MAX, Range, SETUP_DATA, ZERO_PAGE, memory_map};
use super::{Error, Loaded, Request, entry};
use cpu::Registers;
use memory::GuestMemory;

/// Offset of the setup header in both the file and `boot_params`.
pub(super) const SETUP_HEADER: usize = 0x1f1;
const E820_ENTRIES_MAX: usize = 128;
const SETUP_RNG_SEED: u32 = 9;
/// Highest end of an initrd when the kernel does not say: what every 64-bit kernel accepts.
const INITRD_END_MAX: u64 = 0x7fff_ffff;
/// "Undefined boot loader" with extended type (Linux `boot.rst`, type_of_loader).
const LOADER_TYPE: u8 = 0xff;

/// Fills in `boot_params` around `header` (the image's setup header, or nothing for an ELF kernel), places command
/// line and initrd, and answers the state for a jump to the 64-bit `entry`. `kernel` is what the kernel occupies,
/// with the room it needs to unpack itself.
pub(super) fn start(
    memory: &GuestMemory,
    request: &Request<'_>,
    header: &[u8],
    kernel: Loaded,
    entry: u64,
) -> Result<Registers, Error> {
    let mut params = vec![0u8; 4096];
    put(&mut params, SETUP_HEADER, header);
    if header.is_empty() {
        put(&mut params, 0x1fe, &0xaa55u16.to_le_bytes());
        put(&mut params, 0x202, b"HdrS");
        put(&mut params, 0x206, &0x20cu16.to_le_bytes());
    }
    // LOADED_HIGH stays as it is; the loader's own fields follow.
    put(&mut params, 0x210, &[LOADER_TYPE]);
    put_command_line(memory, request, header, &mut params)?;
    if let Some((address, len)) = place_initrd(memory, request, header, kernel)? {
        put(&mut params, 0x218, &address.to_le_bytes());
        put(&mut params, 0x21c, &len.to_le_bytes());
    }
    put(&mut params, 0x70, &request.rsdp.to_le_bytes());
    put_memory_map(&mut params, &memory_map(memory, request.reserved));
    let seed = rng_seed(&request.seed);
    memory.write(SETUP_DATA, &seed)?;
    put(&mut params, 0x250, &SETUP_DATA.to_le_bytes());
    memory.write(ZERO_PAGE, &params)?;
    let mut registers = entry::long_mode(memory, entry)?;
    if let Some(rsi) = registers.gpr.get_mut(entry::RSI) {
        *rsi = ZERO_PAGE;
    }
    if let Some(rsp) = registers.gpr.get_mut(entry::RSP) {
        *rsp = ZERO_PAGE;
    }
    Ok(registers)
}

fn put_command_line(
    memory: &GuestMemory,
    request: &Request<'_>,
    header: &[u8],
    params: &mut [u8],
) -> Result<(), Error> {
    // cmdline_size: the longest the kernel takes, without the NUL (protocol 2.06).
    let field = super::bytes::Bytes(header).u32(0x238u64.wrapping_sub(SETUP_HEADER as u64));
    let max = field.filter(|&size| size > 0).map_or(2047, |size| size as usize);
    let max = max.min(COMMAND_LINE_MAX.wrapping_sub(1));
    let len = request.command_line.len();
    if len > max {
        return Err(Error::CommandLine { len, max });
    }
    write_string(memory, COMMAND_LINE, request.command_line)?;
    put(params, 0x228, &(COMMAND_LINE as u32).to_le_bytes());
    Ok(())
}

/// Writes a NUL-terminated string.
pub(super) fn write_string(memory: &GuestMemory, at: u64, text: &str) -> Result<(), Error> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    Ok(memory.write(at, &bytes)?)
}

/// Copies the initrd as high as it may go in low RAM, clear of the kernel.
fn place_initrd(
    memory: &GuestMemory,
    request: &Request<'_>,
    header: &[u8],
    kernel: Loaded,
) -> Result<Option<(u32, u32)>, Error> {
    let Some(initrd) = request.modules.first() else { return Ok(None) };
    let last = super::bytes::Bytes(header).u32(0x22cu64.wrapping_sub(SETUP_HEADER as u64));
    let limit = last.filter(|&last| last > 0).map_or(INITRD_END_MAX, u64::from).saturating_add(1);
    let placed = super::place_below(memory, kernel, initrd.bytes, limit)?;
    let len = placed.end.wrapping_sub(placed.start);
    Ok(u32::try_from(placed.start).ok().zip(u32::try_from(len).ok()))
}

fn put_memory_map(params: &mut [u8], map: &[Range]) {
    let map = map.get(..E820_ENTRIES_MAX.min(map.len())).unwrap_or_default();
    put(params, 0x1e8, &[u8::try_from(map.len()).unwrap_or(0)]);
    for (index, range) in map.iter().enumerate() {
        let at = index.wrapping_mul(20).wrapping_add(0x2d0);
        put(params, at, &range.base.to_le_bytes());
        put(params, at.wrapping_add(8), &range.len.to_le_bytes());
        put(params, at.wrapping_add(16), &(range.kind as u32).to_le_bytes());
    }
}

/// A `setup_data` node with entropy for the kernel's first random numbers (Linux 6.0 and later).
fn rng_seed(seed: &[u8; 32]) -> Vec<u8> {
    let mut node = vec![0; 16];
    put(&mut node, 8, &SETUP_RNG_SEED.to_le_bytes());
    put(&mut node, 12, &32u32.to_le_bytes());
    node.extend_from_slice(seed);
    node
}
