//! Which file system a file is on, and on which of its devices the data lies.
//!
//! Invariant: read only; each function asks one question and reports the kernel's errno unchanged, so that a caller can
//! tell "has no such ioctl" ([`crate::is_unsupported`]) from "failed".

use std::io;
use std::os::fd::BorrowedFd;

use crate::ioc;

#[repr(C)]
struct FsUuid {
    length: u8,
    uuid: [u8; 16],
}

const FS_IOC_GETFSUUID: u64 = ioc::ior::<FsUuid>(0x15, 0);
const _: () = assert!(FS_IOC_GETFSUUID == 0x8011_1500);

/// The UUID that the file system announced to the VFS (`FS_IOC_GETFSUUID`, Linux 6.9), or `None` when it is shorter
/// than 16 bytes or all zero.
///
/// # Errors
/// `ENOTTY` on older kernels or without a UUID.
pub fn fs_uuid(fd: BorrowedFd<'_>) -> io::Result<Option<[u8; 16]>> {
    let mut answer = FsUuid { length: 0, uuid: [0; 16] };
    // SAFETY: `_IOR` of exactly `FsUuid`: the kernel writes 17 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd, FS_IOC_GETFSUUID, &mut answer) }?;
    Ok((answer.length == 16 && answer.uuid != [0; 16]).then_some(answer.uuid))
}

#[repr(C)]
struct BtrfsFsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u8; 992],
}

const BTRFS_IOC_FS_INFO: u64 = ioc::ior::<BtrfsFsInfo>(0x94, 31);
const _: () = assert!(BTRFS_IOC_FS_INFO == 0x8400_941f);

/// The fsid of a btrfs (`BTRFS_IOC_FS_INFO`).
///
/// # Errors
/// `ENOTTY` elsewhere.
pub fn btrfs_fsid(fd: BorrowedFd<'_>) -> io::Result<[u8; 16]> {
    let mut answer = BtrfsFsInfo { max_id: 0, num_devices: 0, fsid: [0; 16], rest: [0; 992] };
    // SAFETY: `_IOR` of exactly `BtrfsFsInfo`: the kernel writes 1,024 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd, BTRFS_IOC_FS_INFO, &mut answer) }?;
    Ok(answer.fsid)
}

/// What `XFS_IOC_FSGEOMETRY` says, as far as identity needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XfsGeometry {
    /// UUID of the file system.
    pub uuid: [u8; 16],
    /// Blocks on the real-time device; more than 0 means that files may live there.
    pub rt_blocks: u64,
    /// Files can share blocks (`XFS_FSOP_GEOM_FLAGS_REFLINK`).
    pub reflink: bool,
    /// Bytes of an allocation group of the data device: addresses in one group are found under one lock.
    pub group_bytes: u64,
}

/// The head of `struct xfs_fsop_geom_v1`, which newer versions only extend.
#[repr(C)]
struct XfsGeometryV1 {
    /// Block size, extent size of the real-time device, blocks of an allocation group, number of groups, ...
    geometry: [u32; 8],
    data_blocks: u64,
    rt_blocks: u64,
    rt_extents: u64,
    log_start: u64,
    uuid: [u8; 16],
    stripe: [u32; 2],
    version: i32,
    flags: u32,
    rest: [u32; 4],
}

const XFS_FSOP_GEOM_FLAGS_REFLINK: u32 = 1 << 20;
const _: () = assert!(size_of::<XfsGeometryV1>() == 112);
const _: () = assert!(std::mem::offset_of!(XfsGeometryV1, flags) == 92);
const XFS_IOC_FSGEOMETRY_V1: u64 = ioc::ior::<XfsGeometryV1>(b'X', 100);
const _: () = assert!(XFS_IOC_FSGEOMETRY_V1 == 0x8070_5864);

/// Geometry of an XFS.
///
/// # Errors
/// `ENOTTY` elsewhere.
pub fn xfs_geometry(fd: BorrowedFd<'_>) -> io::Result<XfsGeometry> {
    let mut answer = XfsGeometryV1 {
        geometry: [0; 8],
        data_blocks: 0,
        rt_blocks: 0,
        rt_extents: 0,
        log_start: 0,
        uuid: [0; 16],
        stripe: [0; 2],
        version: 0,
        flags: 0,
        rest: [0; 4],
    };
    // SAFETY: `_IOR` of exactly `XfsGeometryV1`: the kernel writes 112 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd, XFS_IOC_FSGEOMETRY_V1, &mut answer) }?;
    let reflink = answer.flags & XFS_FSOP_GEOM_FLAGS_REFLINK != 0;
    let [block_bytes, _, group_blocks, ..] = answer.geometry.map(u64::from);
    let group_bytes = block_bytes * group_blocks;
    Ok(XfsGeometry { uuid: answer.uuid, rt_blocks: answer.rt_blocks, reflink, group_bytes })
}

#[repr(C)]
#[derive(Default)]
struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

const _: () = assert!(size_of::<FsXattr>() == 28);
const FS_IOC_FSGETXATTR: u64 = ioc::ior::<FsXattr>(b'X', 31);
const FS_XFLAG_REALTIME: u32 = 1;

/// Whether the file's data is on the XFS real-time device (`FS_IOC_FSGETXATTR`, `FS_XFLAG_REALTIME`).
///
/// # Errors
/// `ENOTTY` where the file system has no such attributes.
pub fn is_realtime(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut answer = FsXattr::default();
    // SAFETY: `_IOR` of exactly `FsXattr`: the kernel writes 28 bytes, all of them plain integers.
    unsafe { ioc::ioctl(fd, FS_IOC_FSGETXATTR, &mut answer) }?;
    Ok(answer.xflags & FS_XFLAG_REALTIME != 0)
}
