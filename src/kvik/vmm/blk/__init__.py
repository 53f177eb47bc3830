"""kvik-blk: one disk's images in a process of their own, served to a VMM over vhost-user.

    kvik-vmm's VhostUserBlk --messages--> back_end.BackEnd --rings--> virtio.blk.Blk --> image.FormatImage --> files

The device is kvik-vmm's own `Blk`, on the guest's memory as its VMM tells where it is; what lies below is `kvik.image`.
Everything is opened by whoever starts it and passed as descriptors: it opens nothing, and cannot.
"""
